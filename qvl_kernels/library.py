"""Registration of ops with PyTorch under ``qvl::``."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from qvl_kernels import config, dispatch

__all__ = [
    "AUTOGRAD",
    "LAUNCHERS",
    "TENSOR_TYPES",
    "call",
    "derivative_again",
    "has_memory",
    "is_eligible",
    "ops_are_seen",
    "register",
    "needs_dispatcher",
]

_LIBRARY = torch.library.Library("qvl", "DEF")
LAUNCHERS: dict[str, Callable] = {}  # op name -> its Triton launcher
AUTOGRAD: dict[str, tuple[Callable, Callable | None]] = {}  # op name -> (backward, setup_context)
_CPU: dict[Callable, Callable] = {}  # op -> its CPU kernel
_GPU: dict[Callable, Callable] = {}  # op -> its Triton launcher
TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)


def _keys(x: torch.Tensor) -> int:
    """All that makes PyTorch's dispatcher treat a tensor specially."""
    return torch._C._dispatch_keys(x).raw_repr()


@functools.cache
def _plain_keys(device: str) -> frozenset[int]:
    """Of tensors about which nothing is special, in inference mode and outside of it."""
    found = set()
    for inference in (True, False):
        with torch.inference_mode(inference):
            found.add(_keys(torch.empty(0, device=device)))
    return frozenset(found)


_plain_keys("cpu")  # while nothing traces or compiles


def is_eligible(x: torch.Tensor, device: str) -> bool:
    """Whether kernels may take a tensor's memory on a "cpu" or "cuda" as it is: dense, not fake, not negated when read,
    no subclass, ...
    """
    return type(x) in TENSOR_TYPES and _keys(x) in _plain_keys(device)


def has_memory(x: torch.Tensor) -> bool:
    """Whether the storage of a plain tensor has room for all of it: sharding libraries free memory without another
    word.
    """
    there = x.untyped_storage().nbytes()
    if x.is_contiguous():
        return there >= x.storage_offset() * x.itemsize + x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return not x.nbytes or there >= (x.storage_offset() + last + 1) * x.itemsize


def ops_are_seen() -> bool:
    """Whether something in this thread must see PyTorch's own operations: a mode, torch.func (grad, vmap, ...), or
    forward-mode AD. A mode of where new tensors lie, as of ``torch.set_default_device``, is none.
    """
    modes = torch._C._len_torch_function_stack()
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or modes
        and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(modes))
    )


def register(
    schema: str,
    *,
    cpu: Callable,
    fake: Callable,
    triton: Callable | None = None,
    backward: Callable | None = None,
    backward_again: Callable | None = None,
    setup_context: Callable | None = None,
) -> Callable:
    """Registers an op: schema as in ``torch.library``, its CPU kernel, its fake kernel and, if trained, its backward.

    ``triton``: the launcher on GPUs; where it needs Triton, a function that imports it when called.
    ``backward_again``: takes the place of ``backward`` where its results are differentiated themselves
    (``create_graph=True``). Ops named ``*_backward`` are once differentiable: a derivative of their results raises.
    Returns the callable op (``torch.ops.qvl.<name>.default``).
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if triton is not None:
        LAUNCHERS[name] = triton
        _LIBRARY.impl(name, triton, "CUDA")
        if config.interpreted():
            cpu = _either(cpu, triton)
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"qvl::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        AUTOGRAD[name] = backward, setup_context
        torch.library.register_autograd(
            f"qvl::{name}", _either_order(backward, backward_again), setup_context=setup_context, lib=_LIBRARY
        )
    elif name.endswith("_backward"):
        torch.library.register_autograd(f"qvl::{name}", _once_differentiable(name), lib=_LIBRARY)
    op = getattr(torch.ops.qvl, name).default
    _CPU[op] = cpu
    if triton is not None:
        _GPU[op] = triton
    return op


def _either_order(backward: Callable, backward_again: Callable | None) -> Callable:
    if backward_again is None:
        return backward
    return lambda ctx, *grads: (backward_again if torch.is_grad_enabled() else backward)(ctx, *grads)


def _once_differentiable(name: str) -> Callable:
    def refuse(ctx: Any, *grads: torch.Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"qvl::{name} is once differentiable: there is no second derivative of {name.removesuffix('_backward')} "
            f"here. "
            'Run its forward inside qvl_kernels.use_backend("reference"), which has derivatives of every order'
        )

    return refuse


def derivative_again(
    function: Callable, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Gradients of ``function``, of PyTorch operations, as functions of its inputs and ``grads`` that can be
    differentiated themselves; None for inputs that need none.

    Example:
        >>> derivative_again(swiglu_reference, (gate, up), (grad,))
    """
    inputs = [x.view_as(x) for x in inputs]  # if one comes from another, that way does not count
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    pairs = [(out, grad) for out, grad in zip(outs, grads) if grad is not None and out.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    ends, grads = [out for out, _ in pairs], [grad for _, grad in pairs]
    found = iter(
        torch.autograd.grad(ends, wanted, grads, create_graph=True, allow_unused=True)
        if pairs
        else [None] * len(wanted)
    )
    return [next(found) if x.requires_grad else None for x in inputs]


def needs_dispatcher() -> bool:
    """Whether PyTorch must see every op: it differentiates, compiles, transforms or traces in this thread, or a
    dispatch mode does as it likes.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def call(op: Callable, *args: Any) -> Any:
    """``op(*args)``, past PyTorch's dispatcher where it has nothing to do: inference on plain tensors. On CPUs for ops
    of every decoded token, whose weights have pushed the dispatcher out of the processor's caches: it takes 0.1 ms
    there. On GPUs because a prompt's many small kernels take the host longer than the device. Not for ops that write to
    an argument.

    Example:
        >>> y = call(rms_norm_op, x, weight, 1e-6)
    """
    if needs_dispatcher() or torch._C._len_torch_function_stack():
        return op(*args)
    kernels = _CPU
    for x in args:
        if isinstance(x, torch.Tensor):
            if x.is_cuda:
                kernels = _GPU
            if type(x) not in TENSOR_TYPES or _keys(x) not in _plain_keys("cuda" if x.is_cuda else "cpu"):
                return op(*args)
    return kernels[op](*args)


def _either(cpu: Callable, launcher: Callable) -> Callable:
    """Under Triton's interpreter CPU tensors may go either way."""
    return lambda *args: (launcher if dispatch.forced() == "triton" else cpu)(*args)
