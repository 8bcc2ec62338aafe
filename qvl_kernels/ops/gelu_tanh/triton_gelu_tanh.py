"""gelu_tanh of x + bias and its backward: inputs read once, outputs written once."""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu.launch import launch
from qvl_kernels.gpu.tiles import cdiv, elementwise
from qvl_kernels.gpu.views import rows_view

__all__ = ["launch_gelu_tanh", "launch_gelu_tanh_backward"]


@triton.jit
def _twice_u(x):
    """2 u of gelu(x) = x (1 + tanh(u)) / 2 = x sigmoid(2 u); the sigmoid neither overflows nor cancels."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def _gelu_tanh_kernel(x_rows, bias_ptr, y_rows, size, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y = x / 2 (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3); one program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = tl.load(x_rows.ptr + row * x_rows.stride + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.sigmoid(_twice_u(x))
    tl.store(y_rows.ptr + row * y_rows.stride + offs, y.to(y_rows.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_tanh_backward_kernel(grad_rows, x_rows, bias_ptr, dx_rows, size, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """With s = sigmoid(2 u): dx = grad s (1 + x (1 - s) 2 u'), u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    grad = tl.load(grad_rows.ptr + row * grad_rows.stride + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    x = tl.load(x_rows.ptr + row * x_rows.stride + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    twice_u = _twice_u(x)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    dx = grad * tl.sigmoid(twice_u) * (1.0 + x * tl.sigmoid(-twice_u) * slope)
    tl.store(dx_rows.ptr + row * dx_rows.stride + offs, dx.to(dx_rows.ptr.dtype.element_ty), mask=mask)


def launch_gelu_tanh(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows = rows_view(x)
    count, size = x_rows.ptr.shape
    tile = elementwise(size)
    launch(
        _gelu_tanh_kernel,
        (count, cdiv(size, tile["BLOCK"])),
        x_rows=x_rows,
        bias_ptr=x if bias is None else bias,
        y_rows=rows_view(y),
        size=size,
        HAS_BIAS=bias is not None,
        **tile,
    )
    return y


def launch_gelu_tanh_backward(grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows = rows_view(x)
    count, size = x_rows.ptr.shape
    tile = elementwise(size)
    launch(
        _gelu_tanh_backward_kernel,
        (count, cdiv(size, tile["BLOCK"])),
        grad_rows=rows_view(grad),
        x_rows=x_rows,
        bias_ptr=x if bias is None else bias,
        dx_rows=rows_view(dx),
        size=size,
        HAS_BIAS=bias is not None,
        **tile,
    )
    return dx
