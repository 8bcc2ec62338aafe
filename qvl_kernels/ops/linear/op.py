"""torch op qvl::linear; its backward is PyTorch's GEMMs."""

from typing import Any

import torch

from qvl_kernels.library import register
from qvl_kernels.ops.linear.cpu import linear_cpu

__all__ = ["linear_op"]


def _setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = dw = db = None
    count = x.shape[:-1].numel()
    rows = grad.reshape(count, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        dx = grad @ weight
    if ctx.needs_input_grad[1]:
        dw = rows.t() @ x.reshape(count, x.shape[-1])
    if ctx.has_bias and ctx.needs_input_grad[2]:
        db = rows.sum(0)
    return dx, dw, db


def _launch_linear(*args: Any) -> Any:
    from qvl_kernels.ops.linear.triton_linear import launch_linear

    return launch_linear(*args)


linear_op = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cpu=linear_cpu,
    triton=_launch_linear,
    fake=lambda x, weight, bias: torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device),
    backward=_backward,
    setup_context=_setup,
)
