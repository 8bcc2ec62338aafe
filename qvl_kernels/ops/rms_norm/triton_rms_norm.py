"""rms_norm, add_rms_norm and their backward. A row stays in registers: read once, written once."""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu.device_functions import tile_pointers
from qvl_kernels.gpu.launch import launch
from qvl_kernels.gpu.tiles import PARTIAL_SUMS, cdiv, whole_rows
from qvl_kernels.gpu.views import rows_view

__all__ = ["launch_add_rms_norm", "launch_rms_norm", "launch_rms_norm_backward"]


@triton.jit
def _rms_norm_kernel(
    x_rows,
    residual_rows,
    weight_ptr,
    y_rows,
    total_ptr,
    count,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x / sqrt(mean(x^2) + eps) * weight of ROWS rows.

    HAS_RESIDUAL: x is x + residual, rounded, which is stored too, with y's strides.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < count)[:, None] & (cols < size)[None, :]
    dtype = y_rows.ptr.dtype.element_ty
    x = tl.load(tile_pointers(x_rows, rows, cols), mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if HAS_RESIDUAL:
        residual = tl.load(tile_pointers(residual_rows, rows, cols), mask=mask, other=0.0).to(tl.float32)
        total = (x + residual).to(dtype)
        tl.store(total_ptr + rows[:, None] * y_rows.stride + cols[None, :], total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / size + eps)  # [ROWS]
    normed = (x * scale[:, None]).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < size, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(tile_pointers(y_rows, rows, cols), (normed * weight[None, :]).to(dtype), mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    grad_rows,
    grad_x_rows,
    x_rows,
    weight_ptr,
    dx_rows,
    dweight_ptr,
    count,
    size,
    eps,
    HAS_GRAD_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With r = rsqrt(mean(x^2) + eps), n = x r, g = grad weight: dx = r (g - n mean(g n)) + grad_x, and each program's
    partial sum of dweight = sum(grad n).

    Since 1 = mean(n^2) + eps r^2, dx_i = r (g_i (sum of the other n_j^2 / size + eps r^2) - n_i sum of the other g_j
    n_j / size), which does not cancel in rows that one element dominates.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + cols, mask=cols < size, other=0.0).to(tl.float32)  # [BLOCK]
    dweight = tl.zeros([BLOCK], tl.float32)
    for first in range(program * ROWS, count, programs * ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < count)[:, None] & (cols < size)[None, :]
        x = tl.load(tile_pointers(x_rows, rows, cols), mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        grad = tl.load(tile_pointers(grad_rows, rows, cols), mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / size + eps)
        normed = x * scale[:, None]
        weighted = grad * weight[None, :]
        squares, products = normed * normed, weighted * normed
        other_squares = (tl.sum(squares, 1)[:, None] - squares) / size + (eps * scale * scale)[:, None]
        dx = scale[:, None] * (weighted * other_squares - normed * ((tl.sum(products, 1)[:, None] - products) / size))
        if HAS_GRAD_X:
            dx += tl.load(tile_pointers(grad_x_rows, rows, cols), mask=mask, other=0.0).to(tl.float32)
        tl.store(tile_pointers(dx_rows, rows, cols), dx.to(dx_rows.ptr.dtype.element_ty), mask=mask)
        dweight += tl.sum(grad * normed, 0)
    tl.store(dweight_ptr + program.to(tl.int64) * size + cols, dweight, mask=cols < size)


def launch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _forward(x, None, weight, eps)[0]


def launch_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x, residual, weight, eps)


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows = rows_view(x)
    count, size = x_rows.ptr.shape
    tile = whole_rows(size)
    launch(
        _rms_norm_kernel,
        (cdiv(count, tile["ROWS"]) if size else 0,),
        x_rows=x_rows,
        residual_rows=x_rows if residual is None else rows_view(residual),
        weight_ptr=weight,
        y_rows=rows_view(y),
        total_ptr=total,
        count=count,
        size=size,
        eps=eps,
        HAS_RESIDUAL=residual is not None,
        **tile,
    )
    return y, total


def launch_rms_norm_backward(
    grad: torch.Tensor, grad_x: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows = rows_view(x)
    count, size = x_rows.ptr.shape
    tile = whole_rows(size)
    programs = min(cdiv(count, tile["ROWS"]), PARTIAL_SUMS)
    partial = torch.empty((programs, size), dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_backward_kernel,
        (programs if size else 0,),
        grad_rows=rows_view(grad),
        grad_x_rows=x_rows if grad_x is None else rows_view(grad_x),
        x_rows=x_rows,
        weight_ptr=weight,
        dx_rows=rows_view(dx),
        dweight_ptr=partial,
        count=count,
        size=size,
        eps=eps,
        HAS_GRAD_X=grad_x is not None,
        **tile,
        enable_fp_fusion=False,  # no FMA: a sum minus one of its terms is exact only if both round the product
    )
    return dx, partial.sum(0).to(weight.dtype)
