"""layer_norm, add_layer_norm and their backward. A row stays in registers: read once, written once."""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu.device_functions import tile_pointers
from qvl_kernels.gpu.launch import launch
from qvl_kernels.gpu.tiles import PARTIAL_SUMS, cdiv, whole_rows
from qvl_kernels.gpu.views import rows_view

__all__ = ["launch_add_layer_norm", "launch_layer_norm", "launch_layer_norm_backward"]


@triton.jit
def _layer_norm_kernel(
    x_rows,
    residual_rows,
    weight_ptr,
    bias_ptr,
    y_rows,
    total_ptr,
    count,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias of ROWS rows.

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
    centred = tl.where(mask, x - (tl.sum(x, 1) / size)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / size + eps)  # [ROWS]
    weight = tl.load(weight_ptr + cols, mask=cols < size, other=0.0).to(tl.float32)  # [BLOCK]
    bias = tl.load(bias_ptr + cols, mask=cols < size, other=0.0).to(tl.float32)  # [BLOCK]
    y = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(tile_pointers(y_rows, rows, cols), y.to(dtype), mask=mask)


@triton.jit
def _layer_norm_backward_kernel(
    grad_rows,
    grad_x_rows,
    x_rows,
    weight_ptr,
    dx_rows,
    dweight_ptr,
    dbias_ptr,
    count,
    size,
    eps,
    HAS_GRAD_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With r = rsqrt(var + eps), n = (x - mean) r, g = grad weight: dx = r (g - mean(g) - n mean(g n)) + grad_x, and
    each program's partial sums of dweight = sum(grad n) and dbias = sum(grad).
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + cols, mask=cols < size, other=0.0).to(tl.float32)  # [BLOCK]
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for first in range(program * ROWS, count, programs * ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < count)[:, None] & (cols < size)[None, :]
        x = tl.load(tile_pointers(x_rows, rows, cols), mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        grad = tl.load(tile_pointers(grad_rows, rows, cols), mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - (tl.sum(x, 1) / size)[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1) / size + eps)
        normed = centred * scale[:, None]
        weighted = grad * weight[None, :]
        dx = scale[:, None] * (
            weighted - (tl.sum(weighted, 1) / size)[:, None] - normed * (tl.sum(weighted * normed, 1) / size)[:, None]
        )
        if HAS_GRAD_X:
            dx += tl.load(tile_pointers(grad_x_rows, rows, cols), mask=mask, other=0.0).to(tl.float32)
        tl.store(tile_pointers(dx_rows, rows, cols), dx.to(dx_rows.ptr.dtype.element_ty), mask=mask)
        dweight += tl.sum(grad * normed, 0)
        dbias += tl.sum(grad, 0)
    tl.store(dweight_ptr + program.to(tl.int64) * size + cols, dweight, mask=cols < size)
    tl.store(dbias_ptr + program.to(tl.int64) * size + cols, dbias, mask=cols < size)


def launch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return launch_add_layer_norm(x, None, weight, bias, eps)[0]


def launch_add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows = rows_view(x)
    count, size = x_rows.ptr.shape
    tile = whole_rows(size)
    launch(
        _layer_norm_kernel,
        (cdiv(count, tile["ROWS"]) if size else 0,),
        x_rows=x_rows,
        residual_rows=x_rows if residual is None else rows_view(residual),
        weight_ptr=weight,
        bias_ptr=bias,
        y_rows=rows_view(y),
        total_ptr=total,
        count=count,
        size=size,
        eps=eps,
        HAS_RESIDUAL=residual is not None,
        **tile,
    )
    return y, total


def launch_layer_norm_backward(
    grad: torch.Tensor, grad_x: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows = rows_view(x)
    count, size = x_rows.ptr.shape
    tile = whole_rows(size)
    programs = min(cdiv(count, tile["ROWS"]), PARTIAL_SUMS)
    partial, partial_bias = (torch.empty((programs, size), dtype=torch.float32, device=x.device) for _ in range(2))
    launch(
        _layer_norm_backward_kernel,
        (programs if size else 0,),
        grad_rows=rows_view(grad),
        grad_x_rows=x_rows if grad_x is None else rows_view(grad_x),
        x_rows=x_rows,
        weight_ptr=weight,
        dx_rows=rows_view(dx),
        dweight_ptr=partial,
        dbias_ptr=partial_bias,
        count=count,
        size=size,
        eps=eps,
        HAS_GRAD_X=grad_x is not None,
        **tile,
    )
    return dx, partial.sum(0).to(weight.dtype), partial_bias.sum(0).to(weight.dtype)
