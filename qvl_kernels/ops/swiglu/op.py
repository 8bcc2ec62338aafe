"""torch op qvl::swiglu and its backward."""

from typing import Any

import torch

from qvl_kernels.library import call, differentiable_gradients, register
from qvl_kernels.ops.swiglu.cpu import swiglu_backward_cpu, swiglu_cpu
from qvl_kernels.ops.swiglu.reference import swiglu_reference

__all__ = ["swiglu_op"]


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch_swiglu_backward(*args: Any) -> Any:
    from qvl_kernels.ops.swiglu.triton_swiglu import launch_swiglu_backward

    return launch_swiglu_backward(*args)


def _launch_swiglu(*args: Any) -> Any:
    from qvl_kernels.ops.swiglu.triton_swiglu import launch_swiglu

    return launch_swiglu(*args)


swiglu_backward_op = register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    cpu=swiglu_backward_cpu,
    triton=_launch_swiglu_backward,
    fake=lambda grad, gate, up: (_like(gate), _like(up)),
)


def _setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


swiglu_op = register(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    cpu=swiglu_cpu,
    triton=_launch_swiglu,
    fake=lambda gate, up: _like(gate),
    backward=lambda ctx, grad: call(swiglu_backward_op, grad, *ctx.saved_tensors),
    double_backward=lambda ctx, grad: tuple(differentiable_gradients(swiglu_reference, ctx.saved_tensors, (grad,))),
    setup_context=_setup,
)
