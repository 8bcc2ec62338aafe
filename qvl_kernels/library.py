"""Registration of ops with PyTorch under ``qvl::``."""

import importlib
from collections.abc import Callable

import torch

from qvl_kernels import config, dispatch

__all__ = ["FORMULAS", "LAUNCHERS", "call", "register", "watched"]

_LIBRARY = torch.library.Library("qvl", "DEF")
LAUNCHERS: dict[str, Callable] = {}  # op name -> its Triton launcher
FORMULAS: dict[str, tuple[Callable, Callable | None]] = {}  # op name -> (backward, setup_context), for bench.audit
_CPU: dict[Callable, Callable] = {}  # op -> its CPU kernel
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _keys(x: torch.Tensor) -> int:
    """All that makes PyTorch's dispatcher treat a tensor specially."""
    return torch._C._dispatch_keys(x).raw_repr()


with torch.inference_mode():
    _PLAIN_KEYS = {_keys(torch.empty(0, device="cpu"))}
_PLAIN_KEYS.add(_keys(torch.empty(0, device="cpu")))


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
    """``op(*args)``, past PyTorch's dispatcher where it has nothing to do: inference on plain CPU tensors. For ops of every decoded token,
    whose weights have pushed the dispatcher out of the processor's caches: it takes 0.1 ms there. Not for ops that write to an argument.

    Example:
        >>> y = call(rms_norm_op, x, weight, 1e-6)
    """
    if watched() or torch._C._len_torch_function_stack():
        return op(*args)
    for x in args:
        if isinstance(x, torch.Tensor) and (type(x) not in _PLAIN or _keys(x) not in _PLAIN_KEYS):
            return op(*args)
    return _CPU[op](*args)


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
