"""torch op qvl::quantized_linear; the weight is a constant, so its backward has gradients of x and bias only."""

from typing import Any

import torch

from qvl_kernels.library import register
from qvl_kernels.ops.quantized_linear.cpu import quantized_linear_cpu
from qvl_kernels.quantization import QuantizedWeight, dequantize

__all__ = ["quantized_linear_op"]


def _setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, values, scales, zeros, bias = inputs
    ctx.save_for_backward(values, scales, zeros)
    ctx.size = inputs[0].shape[-1]
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dx = db = None
    if ctx.needs_input_grad[0]:
        values, scales, zeros = ctx.saved_tensors
        dx = grad @ dequantize(QuantizedWeight(values, scales, ctx.size, zeros), grad.dtype)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        db = grad.reshape(-1, grad.shape[-1]).sum(0)
    return dx, None, None, None, db


def _launch_quantized_linear(*args: Any) -> Any:
    from qvl_kernels.ops.quantized_linear.triton_quantized import launch_quantized_linear

    return launch_quantized_linear(*args)


quantized_linear_op = register(
    "quantized_linear(Tensor x, Tensor values, Tensor scales, Tensor? zeros, Tensor? bias) -> Tensor",
    cpu=quantized_linear_cpu,
    triton=_launch_quantized_linear,
    fake=lambda x, values, *_: torch.empty((*x.shape[:-1], values.shape[0]), dtype=x.dtype, device=x.device),
    backward=_backward,
    setup_context=_setup,
)
