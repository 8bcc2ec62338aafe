"""gelu_tanh of x + bias and its backward: inputs read once, outputs written once."""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu.launch import as_rows, launch
from qvl_kernels.gpu.tiles import cdiv, elementwise

__all__ = ["launch_gelu_tanh", "launch_gelu_tanh_backward"]


@triton.jit
def _twice_u(x):
    """2 u of gelu(x) = x (1 + tanh(u)) / 2 = x sigmoid(2 u); the sigmoid neither overflows nor cancels."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def _gelu_tanh_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    size,
    stride_x,
    stride_y,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x / 2 (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3); one program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.sigmoid(_twice_u(x))
    tl.store(y_ptr + row * stride_y + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_tanh_backward_kernel(
    grad_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    size,
    stride_grad,
    stride_x,
    stride_dx,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With s = sigmoid(2 u): dx = grad s (1 + x (1 - s) 2 u'), u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    grad = tl.load(grad_ptr + row * stride_grad + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    x = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    twice_u = _twice_u(x)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    dx = grad * tl.sigmoid(twice_u) * (1.0 + x * tl.sigmoid(-twice_u) * slope)
    tl.store(dx_ptr + row * stride_dx + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def launch_gelu_tanh(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, y_rows = as_rows(x), as_rows(y)
    count, size = rows.shape
    tile = elementwise(size)
    launch(
        _gelu_tanh_kernel,
        (count, cdiv(size, tile["BLOCK"])),
        rows,
        x if bias is None else bias,
        y_rows,
        size,
        rows.stride(0),
        y_rows.stride(0),
        HAS_BIAS=bias is not None,
        **tile,
    )
    return y


def launch_gelu_tanh_backward(grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_rows, rows, dx_rows = as_rows(grad), as_rows(x), as_rows(dx)
    count, size = rows.shape
    tile = elementwise(size)
    launch(
        _gelu_tanh_backward_kernel,
        (count, cdiv(size, tile["BLOCK"])),
        grad_rows,
        rows,
        x if bias is None else bias,
        dx_rows,
        size,
        grad_rows.stride(0),
        rows.stride(0),
        dx_rows.stride(0),
        HAS_BIAS=bias is not None,
        **tile,
    )
    return dx
