"""Registration of ops with PyTorch under ``qvl::``."""

import importlib
from collections.abc import Callable

import torch

from qvl_kernels import config, dispatch

__all__ = ["FORMULAS", "LAUNCHERS", "register"]

_LIBRARY = torch.library.Library("qvl", "DEF")
LAUNCHERS: dict[str, Callable] = {}  # op name -> its Triton launcher
FORMULAS: dict[str, tuple[Callable, Callable | None]] = {}  # op name -> (backward, setup_context), for bench.audit


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
    return getattr(torch.ops.qvl, name).default


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
