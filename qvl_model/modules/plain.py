"""Is a module plain enough for our kernels? Checked at every call: adapters, hooks and casts may come at any time."""

import functools
import warnings

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from transformers.utils import output_capturing

from qvl_kernels import dispatch, gpu

__all__ = ["FAST_DTYPES", "FLASH", "autocast_dtype", "dropout_fits", "is_plain", "kernels_take", "only_capture_hooks"]

FLASH = ("flash_attention_2", "flash_attention_3")  # implementations of attention that mean the same
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


def is_plain(module: nn.Module, kind: type, own_hook: type | None = None) -> bool:
    """Exactly ``kind`` (an adapter wraps or replaces it), no forward hook but pre-hooks of our own class ``own_hook``, ``forward`` not
    replaced on the instance."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and (not module._forward_pre_hooks or all(type(hook) is own_hook for hook in module._forward_pre_hooks.values()))
        and "forward" not in module.__dict__
    )


def no_global_hooks() -> bool:
    return not nn_module._global_forward_hooks and not nn_module._global_forward_pre_hooks


def only_capture_hooks(module: nn.Module, recorded: str) -> bool:
    """Every forward hook is transformers' own recorder, of ``recorded`` ("attentions" or "hidden_states"), and nobody asked for these in this call."""
    if module._forward_pre_hooks:
        return False
    if not module._forward_hooks:
        return True
    for hook in module._forward_hooks.values():
        if getattr(hook, "__module__", None) != output_capturing.__name__:
            return False
    return recorded not in (output_capturing._active_collector.get() or ())


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast brings products on ``device`` in this thread, or None if it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def dropout_fits(p: float, x: torch.Tensor) -> bool:
    """Attention has dropout in its kernel on GPUs; on the CPU PyTorch's own is faster than the reference."""
    return p == 0.0 or x.is_cuda or dispatch.forced() == "triton"


def _gpu_takes(device: torch.device) -> bool:
    reason = gpu.unavailable(device)
    if reason is not None and not torch.compiler.is_compiling():
        _say_once(reason)
    return reason is None


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"qvl_model: the model runs on stock code: {reason}", RuntimeWarning, stacklevel=4)


def kernels_take(*tensors: torch.Tensor | None, cast: bool = True) -> bool:
    """Plain tensors (no subclass: it may hold its values elsewhere) on one CPU or GPU that the kernels run on, of one dtype
    that they know, rows contiguous. ``cast``: autocast, where it is on, would cast this op's inputs, and must find nothing to do."""
    first = tensors[0]
    on_cpu = first.is_cpu
    if not (on_cpu or first.is_cuda and _gpu_takes(first.device)) or first.dtype not in FAST_DTYPES:
        return False
    if cast and autocast_dtype(first.device) not in (None, first.dtype):
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():  # torch.func.grad, vmap, ...
        return False
    dtype = first.dtype
    for x in tensors:  # a plain loop: this runs for every layer and token
        if x is not None and not (
            type(x) in _PLAIN_TENSORS
            and x.dtype is dtype
            and (x.is_cpu if on_cpu else x.device == first.device)
            and (x.stride(-1) == 1 or x.shape[-1] <= 1)
        ):
            return False
    return True
