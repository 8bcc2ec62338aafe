"""torch ops qvl::layer_norm, qvl::add_layer_norm and their backward."""

from typing import Any

import torch

from qvl_kernels.library import call, differentiable_gradients, register
from qvl_kernels.ops.layer_norm.cpu import add_layer_norm_cpu, layer_norm_backward_cpu, layer_norm_cpu
from qvl_kernels.ops.layer_norm.reference import layer_norm_reference

__all__ = ["add_layer_norm_op", "layer_norm_op"]


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch_layer_norm_backward(*args: Any) -> Any:
    from qvl_kernels.ops.layer_norm.triton_layer_norm import launch_layer_norm_backward

    return launch_layer_norm_backward(*args)


def _launch_layer_norm(*args: Any) -> Any:
    from qvl_kernels.ops.layer_norm.triton_layer_norm import launch_layer_norm

    return launch_layer_norm(*args)


def _launch_add_layer_norm(*args: Any) -> Any:
    from qvl_kernels.ops.layer_norm.triton_layer_norm import launch_add_layer_norm

    return launch_add_layer_norm(*args)


layer_norm_backward_op = register(
    "layer_norm_backward(Tensor grad, Tensor? grad_x, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    cpu=layer_norm_backward_cpu,
    triton=_launch_layer_norm_backward,
    fake=lambda grad, grad_x, x, weight, eps: (_like(x), _like(weight), _like(weight)),
)


def _setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *call(layer_norm_backward_op, grad, None, *ctx.saved_tensors, ctx.eps), None


def _double_backward_gradients(ctx: Any, grad: torch.Tensor, grad_total: torch.Tensor | None) -> tuple:
    """Gradients of x, weight and bias that can be differentiated in x and weight; they do not depend on the bias."""
    x, weight = ctx.saved_tensors
    bias = torch.zeros_like(weight, requires_grad=ctx.needs_input_grad[-2])
    return tuple(
        differentiable_gradients(
            lambda x, w, b: (layer_norm_reference(x, w, b, ctx.eps), x), (x, weight, bias), (grad, grad_total)
        )
    )


def _double_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_double_backward_gradients(ctx, grad, None), None


def _add_setup(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, _, weight, _, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _add_backward(ctx: Any, grad_y: torch.Tensor, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dx, dw, db = call(layer_norm_backward_op, grad_y, grad_total, *ctx.saved_tensors, ctx.eps)
    return dx, dx, dw, db, None


def _add_double_backward(ctx: Any, grad_y: torch.Tensor, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dx, dw, db = _double_backward_gradients(ctx, grad_y, grad_total)
    return dx, dx, dw, db, None


layer_norm_op = register(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    cpu=layer_norm_cpu,
    triton=_launch_layer_norm,
    fake=lambda x, weight, bias, eps: _like(x),
    backward=_backward,
    double_backward=_double_backward,
    setup_context=_setup,
)
add_layer_norm_op = register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    cpu=add_layer_norm_cpu,
    triton=_launch_add_layer_norm,
    fake=lambda x, residual, weight, bias, eps: (_like(x), _like(x)),
    backward=_add_backward,
    double_backward=_add_double_backward,
    setup_context=_add_setup,
)
