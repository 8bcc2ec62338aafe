"""torch ops qvl::swiglu and its backward."""

import torch

from qvl_kernels.library import register
from qvl_kernels.ops.swiglu.cpu import swiglu_backward_cpu, swiglu_cpu

__all__ = ["swiglu_op"]


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


swiglu_backward_op = register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    cpu=swiglu_backward_cpu,
    triton="qvl_kernels.ops.swiglu.triton_swiglu:launch_swiglu_backward",
    fake=lambda grad, gate, up: (_like(gate), _like(up)),
)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


swiglu_op = register(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    cpu=swiglu_cpu,
    triton="qvl_kernels.ops.swiglu.triton_swiglu:launch_swiglu",
    fake=lambda gate, up: _like(gate),
    backward=lambda ctx, grad: swiglu_backward_op(grad, *ctx.saved_tensors),
    setup_context=_setup,
)
