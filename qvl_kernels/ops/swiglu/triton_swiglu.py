"""swiglu and its backward: each reads its inputs once and writes its outputs once."""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu.launch import as_rows, launch
from qvl_kernels.gpu.tiles import cdiv, elementwise

__all__ = ["launch_swiglu", "launch_swiglu_backward"]


@triton.jit
def _swiglu_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    size,
    stride_gate,
    stride_up,
    stride_y,
    BLOCK: tl.constexpr,
):
    """y = gate * sigmoid(gate) * up; one program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    gate = tl.load(gate_ptr + row * stride_gate + offs, mask=mask).to(tl.float32)  # [BLOCK]
    up = tl.load(up_ptr + row * stride_up + offs, mask=mask).to(tl.float32)  # [BLOCK]
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * stride_y + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    size,
    stride_grad,
    stride_gate,
    stride_up,
    stride_dgate,
    stride_dup,
    BLOCK: tl.constexpr,
):
    """With s = sigmoid(gate): dgate = grad up s (1 + gate (1 - s)), dup = grad gate s."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    grad = tl.load(grad_ptr + row * stride_grad + offs, mask=mask).to(tl.float32)  # [BLOCK]
    gate = tl.load(gate_ptr + row * stride_gate + offs, mask=mask).to(tl.float32)  # [BLOCK]
    up = tl.load(up_ptr + row * stride_up + offs, mask=mask).to(tl.float32)  # [BLOCK]
    sigmoid = tl.sigmoid(gate)
    dgate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = grad * gate * sigmoid
    tl.store(dgate_ptr + row * stride_dgate + offs, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * stride_dup + offs, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def launch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate_rows, up_rows, y_rows = as_rows(gate), as_rows(up), as_rows(y)
    count, size = gate_rows.shape
    tile = elementwise(size)
    launch(
        _swiglu_kernel,
        (count, cdiv(size, tile["BLOCK"])),
        gate_rows,
        up_rows,
        y_rows,
        size,
        gate_rows.stride(0),
        up_rows.stride(0),
        y_rows.stride(0),
        **tile,
    )
    return y


def launch_swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    grad_rows, gate_rows, up_rows, dgate_rows, dup_rows = (as_rows(x) for x in (grad, gate, up, dgate, dup))
    count, size = gate_rows.shape
    tile = elementwise(size)
    launch(
        _swiglu_backward_kernel,
        (count, cdiv(size, tile["BLOCK"])),
        grad_rows,
        gate_rows,
        up_rows,
        dgate_rows,
        dup_rows,
        size,
        grad_rows.stride(0),
        gate_rows.stride(0),
        up_rows.stride(0),
        dgate_rows.stride(0),
        dup_rows.stride(0),
        **tile,
    )
    return dgate, dup
