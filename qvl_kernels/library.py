"""Registration of ops with PyTorch under ``qvl::``."""

import functools
import importlib
from collections.abc import Callable

import torch

from qvl_kernels import config, dispatch

__all__ = ["FORMULAS", "LAUNCHERS", "call", "register", "watched"]

_LIBRARY = torch.library.Library("qvl", "DEF")
LAUNCHERS: dict[str, Callable] = {}  # op name -> its Triton launcher
FORMULAS: dict[str, tuple[Callable, Callable | None]] = {}  # op name -> (backward, setup_context), for bench.audit
_CPU: dict[Callable, Callable] = {}  # op -> its CPU kernel
_GPU: dict[Callable, Callable] = {}  # op -> its Triton launcher
_PLAIN = (torch.Tensor, torch.nn.Parameter)


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


def register(
    schema: str,
    *,
    cpu: Callable,
    fake: Callable,
    triton: str | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Callable:
    """Registers an op: schema as in ``torch.library``, its CPU kernel, its fake kernel and, if trained, its backward.

    ``triton``: "module:function" of the Triton launcher, imported at its first call (Triton is not needed on CPU).
    Returns the callable op (``torch.ops.qvl.<name>.default``).
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if triton is not None:
        launcher = LAUNCHERS[name] = _lazily(triton)
        _LIBRARY.impl(name, launcher, "CUDA")
        if config.interpreted():
            cpu = _either(cpu, launcher)
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"qvl::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        FORMULAS[name] = backward, setup_context
        torch.library.register_autograd(f"qvl::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    op = getattr(torch.ops.qvl, name).default
    _CPU[op] = cpu
    if triton is not None:
        _GPU[op] = launcher
    return op


def watched() -> bool:
    """Whether PyTorch must see every op: it differentiates, compiles, transforms or traces in this thread, or a dispatch mode does as it likes."""
    return bool(
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def call(op: Callable, *args):
    """``op(*args)``, past PyTorch's dispatcher where it has nothing to do: inference on plain tensors. On CPUs for ops of every decoded token,
    whose weights have pushed the dispatcher out of the processor's caches: it takes 0.1 ms there. On GPUs because a prompt's many small
    kernels take the host longer than the device. Not for ops that write to an argument.

    Example:
        >>> y = call(rms_norm_op, x, weight, 1e-6)
    """
    if watched() or torch._C._len_torch_function_stack():
        return op(*args)
    kernels = _CPU
    for x in args:
        if isinstance(x, torch.Tensor):
            if x.is_cuda:
                kernels = _GPU
            if type(x) not in _PLAIN or _keys(x) not in _plain_keys("cuda" if x.is_cuda else "cpu"):
                return op(*args)
    return kernels[op](*args)


def _lazily(path: str) -> Callable:
    module, function = path.split(":")
    loaded: list[Callable] = []

    def launcher(*args):
        if not loaded:
            loaded.append(getattr(importlib.import_module(module), function))
        return loaded[0](*args)

    return launcher


def _either(cpu: Callable, launcher: Callable) -> Callable:
    """Under Triton's interpreter CPU tensors may go either way."""
    return lambda *args: (launcher if dispatch.forced() == "triton" else cpu)(*args)
