"""torch ops qvl::rms_norm, qvl::add_rms_norm and their backward."""

from typing import Any

import torch

from qvl_kernels.library import call, differentiable_gradients, register
from qvl_kernels.ops.rms_norm.cpu import add_rms_norm_cpu, rms_norm_backward_cpu, rms_norm_cpu
from qvl_kernels.ops.rms_norm.reference import rms_norm_reference

__all__ = ["add_rms_norm_op", "rms_norm_backward_op", "rms_norm_op"]


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch_rms_norm_backward(*args: Any) -> Any:
    from qvl_kernels.ops.rms_norm.triton_rms_norm import launch_rms_norm_backward

    return launch_rms_norm_backward(*args)


def _launch_rms_norm(*args: Any) -> Any:
    from qvl_kernels.ops.rms_norm.triton_rms_norm import launch_rms_norm

    return launch_rms_norm(*args)


def _launch_add_rms_norm(*args: Any) -> Any:
    from qvl_kernels.ops.rms_norm.triton_rms_norm import launch_add_rms_norm

    return launch_add_rms_norm(*args)


rms_norm_backward_op = register(
    "rms_norm_backward(Tensor grad, Tensor? grad_x, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    cpu=rms_norm_backward_cpu,
    triton=_launch_rms_norm_backward,
    fake=lambda grad, grad_x, x, weight, eps: (_like(x), _like(weight)),
)


def _setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *call(rms_norm_backward_op, grad, None, *ctx.saved_tensors, ctx.eps), None


def _double_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *differentiable_gradients(
        lambda x, weight: rms_norm_reference(x, weight, ctx.eps), ctx.saved_tensors, (grad,)
    ), None


def _add_setup(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _add_backward(ctx: Any, grad_y: torch.Tensor, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dx, dw = call(rms_norm_backward_op, grad_y, grad_total, *ctx.saved_tensors, ctx.eps)
    return dx, dx, dw, None


def _add_double_backward(ctx: Any, grad_y: torch.Tensor, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dx, dw = differentiable_gradients(
        lambda x, weight: (rms_norm_reference(x, weight, ctx.eps), x), ctx.saved_tensors, (grad_y, grad_total)
    )
    return dx, dx, dw, None


rms_norm_op = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    cpu=rms_norm_cpu,
    triton=_launch_rms_norm,
    fake=lambda x, weight, eps: _like(x),
    backward=_backward,
    double_backward=_double_backward,
    setup_context=_setup,
)
add_rms_norm_op = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    cpu=add_rms_norm_cpu,
    triton=_launch_add_rms_norm,
    fake=lambda x, residual, weight, eps: (_like(x), _like(x)),
    backward=_add_backward,
    double_backward=_add_double_backward,
    setup_context=_add_setup,
)
