"""swiglu on the CPU: forward in C++, backward in PyTorch operations."""

import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES

__all__ = ["swiglu_backward_cpu", "swiglu_cpu"]


def swiglu_cpu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    size = gate.shape[-1]
    gate_rows, up_rows = (x.reshape(x.shape[:-1].numel(), size) for x in (gate, up))
    y = torch.empty(gate.shape, dtype=gate.dtype)
    dispatch.extension().swiglu(
        gate=gate_rows.data_ptr(),
        up=up_rows.data_ptr(),
        y=y.data_ptr(),
        rows=gate_rows.shape[0],
        size=size,
        gate_stride=gate_rows.stride(0),
        up_stride=up_rows.stride(0),
        y_stride=size,
        dtype=DTYPE_CODES[gate.dtype],
    )
    return y


def swiglu_backward_cpu(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    g, wide = grad.float(), gate.float()
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    dgate = (g * up.float() * (sigmoid + silu * (1.0 - sigmoid))).to(gate.dtype)
    dup = (g * silu).to(up.dtype)
    return dgate.contiguous(), dup.contiguous()
