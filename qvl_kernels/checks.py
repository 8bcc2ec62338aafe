"""Argument checks shared by the public functions. Messages say what is expected, what was given, and what to do."""

import numbers
from typing import Any

import torch

from qvl_kernels.library import TENSOR_TYPES, has_memory

__all__ = [
    "DTYPE_CODES",
    "FLOAT_DTYPES",
    "check_bool",
    "check_device",
    "check_dtype",
    "check_eps",
    "check_int",
    "check_kind",
    "check_last_contiguous",
    "check_memory",
    "check_no_gradient",
    "check_number",
    "check_probability",
    "check_same",
    "check_scale",
    "check_shape",
    "check_tensor",
    "or_filled",
    "unsupported_dtype",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/dtype.h
LARGEST = torch.finfo(torch.float32).max  # largest eps and scale: kernels compute in fp32


def check_tensor(op: str, name: str, x: Any, ndim: int | None = None) -> None:
    """TypeError unless ``x`` is a floating-point tensor; ValueError unless it is dense and has ``ndim`` dimensions."""
    check_kind(op, name, x)
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor (fp32, bf16 or fp16), got {x.dtype}")
    if ndim is not None and x.dim() != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions, got shape {tuple(x.shape)}")


def check_dtype(op: str, name: str, x: Any, *dtypes: torch.dtype) -> None:
    """TypeError unless ``x`` is a tensor of one of ``dtypes``; ValueError unless it is dense."""
    check_kind(op, name, x)
    if x.dtype not in dtypes:
        raise TypeError(
            f"{op}: {name} must be a tensor of "
            f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got {x.dtype}"
        )


def check_kind(op: str, name: str, x: Any) -> None:
    """TypeError unless ``x`` is a tensor; ValueError unless it is dense and its memory is allocated."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, got layout {x.layout}; call {name}.to_dense() first")
    if x.is_nested:
        raise ValueError(f"{op}: {name} must be a dense tensor, got a nested one; pad it first")
    if torch.compiler.is_compiling():
        return
    if x._is_zerotensor():
        raise ValueError(f"{op}: {name} stands for zeros and has no memory; call {name}.clone() first")
    if type(x) in TENSOR_TYPES and not torch._C._are_functorch_transforms_active() and not has_memory(x):
        there = x.untyped_storage().nbytes()
        raise ValueError(
            f"{op}: the memory of {name} was freed or cut: its storage has {there} bytes for shape "
            f"{tuple(x.shape)}; fill it again first"
        )


def check_memory(op: str, name: str, x: torch.Tensor) -> None:
    """ValueError unless an op may read and write ``x``'s memory directly, for ops with lists of tensors, which PyTorch
    does not resolve (conjugate and negative bits).
    """
    check_kind(op, name, x)
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{op}: {name} is negated when it is read; call {name}.resolve_neg() first")
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{op}: the last dimension of {name} must be contiguous, got strides {tuple(x.stride())}; call "
            f"{name}.contiguous() first"
        )


def _untraced(value: Any) -> Any:
    """The number in ``value``: under ``torch.jit.trace`` sizes, and what is computed from them, are tensors."""
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 and torch.jit.is_tracing() else value


def check_int(op: str, name: str, value: Any, low: int, high: int = 2**63 - 1) -> int:
    """``value`` as an int; TypeError unless it is one (bool is not), ValueError unless low <= value <= high."""
    if type(value) is not int:
        value = _untraced(value)
        if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
        value = value if isinstance(value, torch.SymInt) else int(value)
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must lie in [{low}, {high}], got {value}")
    return value


def check_number(op: str, name: str, value: Any, low: float, high: float) -> float:
    """``value`` as a float; TypeError unless it is a number (bool is not), ValueError unless low <= value <= high (NaN
    is refused).
    """
    if type(value) is not float:
        value = _untraced(value)
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must lie in [{low:.4g}, {high:.4g}], got {value}")
    return value if type(value) is float else torch.sym_float(value)


def check_probability(op: str, name: str, value: Any) -> float:
    """``value`` as a float in [0, 1)."""
    value = check_number(op, name, value, 0.0, 1.0)
    if value == 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1), got {value}")
    return value


def check_eps(op: str, eps: object) -> float:
    return check_number(op, "eps", eps, 0.0, LARGEST)


def check_scale(op: str, scale: object, head_dim: int) -> float:
    """``scale`` of attention scores as a float; 1 / sqrt(head_dim) for None."""
    return head_dim**-0.5 if scale is None else check_number(op, "scale", scale, -LARGEST, LARGEST)


def check_bool(op: str, name: str, value: Any) -> bool:
    value = _untraced(value)
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")
    return value


def check_no_gradient(op: str, advice: str, *tensors: object) -> None:
    """RuntimeError if one of the tensors (other objects are skipped) needs a gradient that ``op`` does not compute."""
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors):
        raise RuntimeError(f"{op} {advice}")


def check_device(op: str, name: str, x: torch.Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{op}: {name} is on {x.device} but the other tensors are on {device}; move {name} there")


def check_shape(op: str, name: str, x: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {tuple(expected)}, got {tuple(x.shape)}")


def check_same(op: str, **tensors: torch.Tensor | None) -> None:
    """Checks that all tensors (None is skipped) have one device and one dtype."""
    items = [(name, x) for name, x in tensors.items() if x is not None]
    first_name, first = items[0]
    for name, x in items[1:]:
        if x.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} is {x.dtype} but {first_name} is {first.dtype}; give both the same dtype, "
                f"for example {name}.to({first_name}.dtype)"
            )
        if x.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {x.device} but {first_name} is on {first.device}; move both to one device"
            )


def check_last_contiguous(op: str, **tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dim() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{op}: the last dimension of {name} must be contiguous, got strides {tuple(x.stride())} for shape "
                f"{tuple(x.shape)}; call {name}.contiguous() first"
            )


def or_filled(op: str, x: Any, vector: torch.Tensor | None, value: float) -> torch.Tensor:
    """``vector``, or in the place of None a vector [C] of ``value`` for x [..., C]."""
    if vector is not None:
        return vector
    check_tensor(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least 1 dimension, got a scalar")
    return x.new_full((x.shape[-1],), value)


def unsupported_dtype(x: torch.Tensor) -> str | None:
    """Why the fast backends cannot take ``x``'s dtype, or None."""
    if x.dtype in FLOAT_DTYPES:
        return None
    return f"dtype {x.dtype} (fast kernels take fp32, bf16 and fp16)"
