"""Views: a tensor and its strides (in elements) as one kernel argument, a named tuple whose members Triton flattens.

On the host ``ptr`` is a tensor, in a kernel a pointer. Triton specialises on every member, whatever do_not_specialize
says, so a length that grows from call to call is no member: each would be a new compilation.
"""

from typing import Any, NamedTuple

import torch

__all__ = [
    "CosSinView",
    "HeadsView",
    "MaskView",
    "RowsView",
    "as_rows",
    "cos_sin_view",
    "heads_view",
    "mask_kind_and_view",
    "rows_view",
]


class RowsView(NamedTuple):
    """A matrix [M, C]; C is contiguous."""

    ptr: Any
    stride: Any


class HeadsView(NamedTuple):
    """A tensor [B, T, H, D]; D is contiguous."""

    ptr: Any
    stride_b: Any
    stride_t: Any
    stride_h: Any


class CosSinView(NamedTuple):
    """The cos or sin cache [B, T, D]; D is contiguous, stride_b is 0 where one row serves the whole batch."""

    ptr: Any
    stride_b: Any
    stride_t: Any


class MaskView(NamedTuple):
    """Attention mask [B, H, T, S]; strides are 0 where it is broadcast."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any
    stride_s: Any


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., C] as [M, C] with a contiguous last dimension: a view where strides allow it, else a copy."""
    size = x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    rows = x.reshape(x.numel() // size if size else 0, size)
    return rows if size <= 1 or rows.stride(-1) == 1 else rows.contiguous()


def rows_view(x: torch.Tensor) -> RowsView:
    """``x`` [..., C] by ``as_rows``."""
    rows = as_rows(x)
    return RowsView(rows, rows.stride(0))


def heads_view(x: torch.Tensor) -> HeadsView:
    """``x`` [B, T, H, D], or varlen [N, H, D], which has no batch."""
    return HeadsView(x, *(x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])))


def mask_kind_and_view(
    mask: torch.Tensor | None, shape: tuple[int, int, int, int], unread: torch.Tensor
) -> tuple[int, MaskView]:
    """(kind, view) of a mask that broadcasts to ``shape`` [B, H, T, S]. Kinds, MASK of the kernels: 0 none, 1 bool,
    2 additive. The view of no mask is of ``unread``, since a kernel takes some tensor.
    """
    if mask is None:
        return 0, MaskView(unread, 0, 0, 0, 0)
    kind = 1 if mask.dtype == torch.bool else 2
    full = (mask.view(torch.uint8) if kind == 1 else mask).expand(shape)
    return kind, MaskView(full, *full.stride())


def cos_sin_view(x: torch.Tensor) -> CosSinView:
    """``x`` [B or 1, T, D]."""
    return CosSinView(x, x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))
