"""swiglu and its backward: each reads its inputs once and writes its outputs once."""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu.launch import launch
from qvl_kernels.gpu.tiles import cdiv, elementwise
from qvl_kernels.gpu.views import rows_view

__all__ = ["launch_swiglu", "launch_swiglu_backward"]


@triton.jit
def _swiglu_kernel(gate_rows, up_rows, y_rows, size, BLOCK: tl.constexpr):
    """y = gate * sigmoid(gate) * up; one program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    gate = tl.load(gate_rows.ptr + row * gate_rows.stride + offs, mask=mask).to(tl.float32)  # [BLOCK]
    up = tl.load(up_rows.ptr + row * up_rows.stride + offs, mask=mask).to(tl.float32)  # [BLOCK]
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_rows.ptr + row * y_rows.stride + offs, y.to(y_rows.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(grad_rows, gate_rows, up_rows, dgate_rows, dup_rows, size, BLOCK: tl.constexpr):
    """With s = sigmoid(gate): dgate = grad up s (1 + gate (1 - s)), dup = grad gate s."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    grad = tl.load(grad_rows.ptr + row * grad_rows.stride + offs, mask=mask).to(tl.float32)  # [BLOCK]
    gate = tl.load(gate_rows.ptr + row * gate_rows.stride + offs, mask=mask).to(tl.float32)  # [BLOCK]
    up = tl.load(up_rows.ptr + row * up_rows.stride + offs, mask=mask).to(tl.float32)  # [BLOCK]
    sigmoid = tl.sigmoid(gate)
    dgate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = grad * gate * sigmoid
    tl.store(dgate_rows.ptr + row * dgate_rows.stride + offs, dgate.to(dgate_rows.ptr.dtype.element_ty), mask=mask)
    tl.store(dup_rows.ptr + row * dup_rows.stride + offs, dup.to(dup_rows.ptr.dtype.element_ty), mask=mask)


def launch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate_rows, up_rows, y_rows = (rows_view(x) for x in (gate, up, y))
    count, size = gate_rows.ptr.shape
    tile = elementwise(size)
    launch(
        _swiglu_kernel,
        (count, cdiv(size, tile["BLOCK"])),
        gate_rows=gate_rows,
        up_rows=up_rows,
        y_rows=y_rows,
        size=size,
        **tile,
    )
    return y


def launch_swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    grad_rows, gate_rows, up_rows, dgate_rows, dup_rows = (rows_view(x) for x in (grad, gate, up, dgate, dup))
    count, size = gate_rows.ptr.shape
    tile = elementwise(size)
    launch(
        _swiglu_backward_kernel,
        (count, cdiv(size, tile["BLOCK"])),
        grad_rows=grad_rows,
        gate_rows=gate_rows,
        up_rows=up_rows,
        dgate_rows=dgate_rows,
        dup_rows=dup_rows,
        size=size,
        **tile,
    )
    return dgate, dup
