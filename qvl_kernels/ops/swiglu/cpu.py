import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.library import register

__all__ = ["swiglu_op"]


def _swiglu_cpu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    size = gate.shape[-1]
    gate_rows, up_rows = gate.reshape(-1, size), up.reshape(-1, size)
    y = torch.empty(gate.shape, dtype=gate.dtype)
    dispatch.extension().swiglu(
        gate=gate_rows.data_ptr(), up=up_rows.data_ptr(), y=y.data_ptr(), rows=gate_rows.shape[0], size=size,
        gate_stride=gate_rows.stride(0), up_stride=up_rows.stride(0), y_stride=size, dtype=DTYPE_CODES[gate.dtype],
    )  # fmt: skip
    return y


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    gate, up = ctx.saved_tensors
    g, wide = grad.float(), gate.float()
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    dgate = g * up.float() * (sigmoid + silu * (1.0 - sigmoid))
    return dgate.to(gate.dtype), (g * silu).to(up.dtype)


swiglu_op = register(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    cpu=_swiglu_cpu,
    fake=lambda gate, up: torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
    backward=_backward,
    setup_context=_setup,
)
