"""Parts of the unfused layers, over weights of any format."""

import torch

from qvl_kernels import dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.gemv import gemv_op, gemv_swiglu_op, quantized_gemv_op, quantized_gemv_swiglu_op
from qvl_kernels.ops.gemv.tiles import is_small_m
from qvl_kernels.ops.linear.op import linear_op
from qvl_kernels.ops.linear.pytorch import pytorch_linear
from qvl_kernels.ops.quantized_linear.op import quantized_linear_op
from qvl_kernels.ops.rms_norm.op import rms_norm_op
from qvl_kernels.ops.swiglu.op import swiglu_op
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["linear_residual", "linear_swiglu", "norm_linears", "matmul"]

Weight = torch.Tensor | QuantizedWeight


def norm_linears(
    x: torch.Tensor, norm: torch.Tensor, eps: float, weights: list[Weight], biases: list
) -> list[torch.Tensor]:
    """rms_norm(x) w^T + bias for each weight. A GEMV fuses the norm: reading the weights dominates its time."""
    if _uses_gemv(x):
        return [_gemv(x, weight, bias, norm, eps, None) for weight, bias in zip(weights, biases)]
    normed = call(rms_norm_op, x, norm, eps)
    return [matmul(normed, weight, bias) for weight, bias in zip(weights, biases)]


def linear_swiglu(x: torch.Tensor, norm: torch.Tensor, eps: float, gate: Weight, up: Weight) -> torch.Tensor:
    """Fused SwiGLU: silu(n gate^T) * (n up^T) with n = rms_norm(x)."""
    if _uses_gemv(x) and type(gate) is type(up):
        if isinstance(gate, QuantizedWeight) and isinstance(up, QuantizedWeight):
            if (gate.bits, gate.group, gate.zeros is None) == (up.bits, up.group, up.zeros is None):
                gate_tensors, up_tensors = ((w.values, w.scales, w.zeros) for w in (gate, up))
                return call(quantized_gemv_swiglu_op, x, *gate_tensors, *up_tensors, norm, eps)
        else:
            return call(gemv_swiglu_op, x, gate, up, norm, eps)
    return call(swiglu_op, *norm_linears(x, norm, eps, [gate, up], [None, None]))


def linear_residual(residual: torch.Tensor, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """residual + x weight^T + bias: a linear layer with a residual epilogue."""
    return _gemv(x, weight, bias, None, 0.0, residual) if _uses_gemv(x) else residual + matmul(x, weight, bias)


def _uses_gemv(x: torch.Tensor) -> bool:
    on_gpu = x.is_cuda or dispatch.forced() == "triton"  # forced: Triton's interpreter runs on CPU tensors
    return on_gpu and is_small_m(x)


def _gemv(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    if isinstance(weight, QuantizedWeight):
        return call(quantized_gemv_op, x, weight.values, weight.scales, weight.zeros, bias, norm, eps, residual)
    return call(gemv_op, x, weight, bias, norm, eps, residual)


def matmul(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x weight^T + bias."""
    if isinstance(weight, QuantizedWeight):
        return call(quantized_linear_op, x, weight.values, weight.scales, weight.zeros, bias)
    return call(linear_op, x, weight, bias) if x.is_cpu else pytorch_linear(x, weight, bias)
