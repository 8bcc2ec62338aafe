"""torch op qvl::gelu_tanh and its backward."""

from typing import Any

import torch

from qvl_kernels.library import call, differentiable_gradients, register
from qvl_kernels.ops.gelu_tanh.cpu import gelu_tanh_backward_cpu, gelu_tanh_cpu
from qvl_kernels.ops.gelu_tanh.reference import gelu_tanh_reference

__all__ = ["gelu_tanh_op"]


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch_gelu_tanh_backward(*args: Any) -> Any:
    from qvl_kernels.ops.gelu_tanh.triton_gelu_tanh import launch_gelu_tanh_backward

    return launch_gelu_tanh_backward(*args)


def _launch_gelu_tanh(*args: Any) -> Any:
    from qvl_kernels.ops.gelu_tanh.triton_gelu_tanh import launch_gelu_tanh

    return launch_gelu_tanh(*args)


gelu_tanh_backward_op = register(
    "gelu_tanh_backward(Tensor grad, Tensor x, Tensor? bias) -> Tensor",
    cpu=gelu_tanh_backward_cpu,
    triton=_launch_gelu_tanh_backward,
    fake=lambda grad, x, bias: _like(x),
)


def _setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx = call(gelu_tanh_backward_op, grad, x, bias)
    db = None if bias is None else dx.reshape(-1, x.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype)
    return dx, db


def _double_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    if bias is None:
        return *differentiable_gradients(lambda x: gelu_tanh_reference(x, None), (x,), (grad,)), None
    return tuple(differentiable_gradients(gelu_tanh_reference, (x, bias), (grad,)))


gelu_tanh_op = register(
    "gelu_tanh(Tensor x, Tensor? bias) -> Tensor",
    cpu=gelu_tanh_cpu,
    triton=_launch_gelu_tanh,
    fake=lambda x, bias: _like(x),
    backward=_backward,
    double_backward=_double_backward,
    setup_context=_setup,
)
