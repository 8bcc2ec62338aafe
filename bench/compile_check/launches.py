"""Records the kernels that a public op would launch on a GPU, without one, and what Triton's JIT would compile for
them.

The op runs on fake CUDA tensors of a case's shapes, strides and dtypes; its launchers choose tiles for an assumed
architecture, and ``qvl_kernels.gpu.launch`` records the arguments. Backward passes run as their autograd formulas say,
without the engine: it would need a CUDA runtime.
"""

import ctypes
import functools
import importlib
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from qvl_kernels import library
from qvl_kernels.gpu import device as gpu_device
from qvl_kernels.gpu import launch as gpu_launch
from qvl_kernels.testing import Case

__all__ = [
    "Call",
    "GRADIENTS_WITH_LOSS",
    "Specialisation",
    "allow_fake_cuda",
    "kernels",
    "record",
    "record_call",
    "record_training",
    "specialise",
    "target",
]

GRADIENTS_WITH_LOSS = {"linear_cross_entropy"}  # ops with another forward where gradients are needed


@dataclass
class Call:
    """One call of a qvl op that reached its Triton launcher."""

    op: str
    bytes: int  # of its inputs and outputs, each once
    launches: list[gpu_launch.Launch] = field(default_factory=list)


class _Context:
    """What an autograd formula expects of its first argument; every floating-point input needs a gradient."""

    def __init__(self, inputs: tuple) -> None:
        self.needs_input_grad = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in inputs]
        self.saved_tensors: tuple = ()
        self.materialize = True

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        pass


def _bytes(*values: Any) -> int:
    tensors = {id(x): x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


class _Launchers(TorchDispatchMode):
    """Sends qvl ops to their Triton launchers and keeps the calls, with inputs and outputs for the formulas."""

    def __init__(self, launches: list[gpu_launch.Launch]) -> None:
        super().__init__()
        self.launches, self.calls, self.differentiable = launches, [], []

    def __torch_dispatch__(self, function: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function._schema.name.removeprefix("qvl::")
        if function.namespace != "qvl" or name not in library.LAUNCHERS:
            return function(*args, **(kwargs or {}))
        before = len(self.launches)
        with self:  # a launcher may call other ops
            out = library.LAUNCHERS[name](*args, **(kwargs or {}))
        self.calls.append(Call(name, _bytes(args, out), self.launches[before:]))
        if name in library.AUTOGRAD:
            defaults = [argument.default_value for argument in function._schema.arguments[len(args) :]]
            self.differentiable.append((name, (*args, *defaults), out))
        return out

    def differentiate(self) -> list[Call]:
        """Runs the formulas of all calls so far, last first; returns the calls that they made.

        Outputs of the op's own dtype get a gradient. Statistics, such as a log-sum-exp, get none: nothing that a model
        computes is differentiated through them.
        """
        begin = len(self.calls)
        for name, args, out in reversed(self.differentiable[:]):
            formula, setup = library.AUTOGRAD[name]
            context = _Context(args)
            if setup is not None:
                setup(context, args, out)
            outputs = out if isinstance(out, tuple) else (out,)
            gradients = [
                torch.empty_like(x)
                if x.dtype == outputs[0].dtype
                else torch.zeros_like(x)
                if context.materialize
                else None
                for x in outputs
            ]
            formula(context, *gradients)
        return self.calls[begin:]


def _like(x: Any, device: str) -> Any:
    """A tensor with the shape, strides, dtype and storage offset of ``x`` on another device; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    span = x.storage_offset() + (
        1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) if x.numel() else 0
    )
    return torch.empty(span, dtype=x.dtype, device=device).as_strided(x.shape, x.stride(), x.storage_offset())


@functools.cache
def _arguments(case: Case, dtype: torch.dtype) -> dict:
    """The arguments of a case as meta tensors."""
    try:
        with FakeTensorMode():  # the largest cases take seconds and gigabytes otherwise
            made = case.make(dtype, torch.Generator().manual_seed(0))
    except DataDependentOutputException:  # quantisation looks at its values
        made = case.make(dtype, torch.Generator().manual_seed(0))
    return tree_map(lambda x: _like(x, "meta"), made)


@functools.cache
def allow_fake_cuda() -> None:
    """Gives a PyTorch without CUDA a device guard for CUDA that does nothing, as PyTorch itself does
    (ensureCUDADeviceGuardSet) where it has CUDA but finds no GPU. Without one, indexing a fake CUDA tensor fails. The
    guard of the meta device is such a one.
    """
    cuda, meta = 1, 14  # c10::DeviceType
    library = ctypes.CDLL(next((Path(torch.__file__).parent / "lib").glob("libc10.*")))
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[cuda] is None:
        guards[cuda] = guards[meta]


def record_call(function: Callable, make: Callable[[], dict], arch: str) -> tuple[list[Call], list[Call]]:
    """(calls of the forward, calls of the backward) of ``function(**make())`` as on a GPU of architecture ``arch``;
    ``make`` and ``function`` may create CUDA tensors, which are fake.
    """
    allow_fake_cuda()
    with (
        torch.no_grad(),
        FakeTensorMode(),
        gpu_device.assume(arch),
        gpu_launch.record() as launches,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # fake tensors have no address and say so
        arguments = make()
        with _Launchers(launches) as launchers:
            function(**arguments)
            forward = launchers.calls[:]
            return forward, launchers.differentiate()


def record(function: Callable, case: Case, dtype: torch.dtype, arch: str) -> tuple[list[Call], list[Call]]:
    """``record_call`` on a shared case.

    Example:
        >>> forward, backward = record(qvl_kernels.swiglu, cases.CASES[0], torch.bfloat16, "sm_90")
        >>> forward[0].launches[0].grid
        (262, 6)
    """
    arguments = _arguments(case, dtype)
    return record_call(function, lambda: tree_map(lambda x: _like(x, "cuda"), arguments), arch)


def record_training(function: Callable, case: Case, dtype: torch.dtype, arch: str) -> list[Call]:
    """Calls of the forward where gradients are wanted, of an op in GRADIENTS_WITH_LOSS."""
    arguments = _arguments(case, dtype)

    def make() -> dict:
        made = tree_map(lambda x: _like(x, "cuda"), arguments)
        return tree_map(
            lambda x: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, made
        )

    return record_call(torch.enable_grad()(function), make, arch)[0]


def target(arch: str) -> GPUTarget:
    """How Triton names an architecture of ``gpu_device.ARCHITECTURES``."""
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


class _Pointer:
    """Stands in for a tensor where Triton's JIT looks at dtype, alignment and, on AMD, size."""

    def __init__(self, x: torch.Tensor) -> None:
        self.dtype = x.dtype
        self._offset = x.storage_offset() * x.element_size()  # allocations themselves are aligned
        self._size = x.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return self._size


@dataclass
class Specialisation:
    """One compilation that the JIT would do. Equal ``key``: the same compilation."""

    kernel: triton.JITFunction
    arch: str
    source: ASTSource
    options: dict
    key: str


def specialise(launch: gpu_launch.Launch, arch: str) -> Specialisation:
    """Signature, constants and attributes by Triton's own binder, so that alignment, ones and do_not_specialize count
    as in a real launch.
    """
    kernel, arguments = launch.kernel, {**launch.arguments, "debug": False}
    backend = make_backend(target(arch))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, chosen = bind(
        **tree_map(lambda x: _Pointer(x) if isinstance(x, torch.Tensor) else x, arguments)
    )
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialisation, chosen)
    source = ASTSource(kernel, signature, constants, attributes)
    key = f"{kernel.__module__}:{kernel.__name__} {arch} {signature} {constants} {attributes} {chosen}"
    return Specialisation(kernel, arch, source, options.__dict__, key)


def kernels(*packages: ModuleType) -> set[str]:
    """Names of all Triton kernels defined in packages: jitted functions whose names end in ``_kernel``."""
    names = set()
    for package in packages:
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.rsplit(".", 1)[1].startswith("triton_"):
                continue
            loaded = importlib.import_module(module.name)
            names |= {
                f"{module.name}:{name}"
                for name, value in vars(loaded).items()
                if isinstance(value, triton.JITFunction)
                and value.__module__ == module.name
                and name.endswith("_kernel")
            }
    return names
