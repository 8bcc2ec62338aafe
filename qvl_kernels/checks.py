"""Argument checks shared by the public functions. Messages say what was expected, what came, and what to do."""

import torch

__all__ = [
    "DTYPE_CODES",
    "FLOAT_DTYPES",
    "check_device",
    "check_last_contiguous",
    "check_same",
    "check_shape",
    "check_tensor",
    "unsupported_dtype",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/dtype.h


def check_tensor(op: str, name: str, x: object, ndim: int | None = None) -> None:
    """TypeError unless ``x`` is a floating-point tensor; ValueError unless it has ``ndim`` dimensions."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor (fp32, bf16 or fp16), got {x.dtype}")
    if ndim is not None and x.dim() != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions, got shape {tuple(x.shape)}")


def check_device(op: str, name: str, x: torch.Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{op}: {name} is on {x.device} but the other tensors are on {device}; move {name} there")


def check_shape(op: str, name: str, x: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {tuple(expected)}, got {tuple(x.shape)}")


def check_same(op: str, **tensors: torch.Tensor | None) -> None:
    """All tensors (None is skipped) on one device and of one dtype."""
    items = [(name, x) for name, x in tensors.items() if x is not None]
    first_name, first = items[0]
    for name, x in items[1:]:
        if x.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} is {x.dtype} but {first_name} is {first.dtype}; give both the same dtype, "
                f"for example {name}.to({first_name}.dtype)"
            )
        if x.device != first.device:
            raise ValueError(f"{op}: {name} is on {x.device} but {first_name} is on {first.device}; move both to one device")


def check_last_contiguous(op: str, **tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dim() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{op}: the last dimension of {name} must be contiguous, got strides {tuple(x.stride())} for shape "
                f"{tuple(x.shape)}; call {name}.contiguous() first"
            )


def unsupported_dtype(x: torch.Tensor) -> str | None:
    """Why the fast backends cannot take ``x``'s dtype, or None."""
    if x.dtype in FLOAT_DTYPES:
        return None
    return f"dtype {x.dtype} (fast kernels take fp32, bf16 and fp16)"
