"""Public function: quantized_linear."""

import torch

from qvl_kernels import checks, dispatch, quantization
from qvl_kernels.library import call
from qvl_kernels.ops.linear.weights import unsupported_scales
from qvl_kernels.ops.quantized_linear.op import quantized_linear_op
from qvl_kernels.ops.quantized_linear.reference import quantized_linear_reference
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["quantized_linear"]


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x @ dequantize(weight).T + bias        [int8 rows: LLM.int8, arXiv:2208.07339; int4 groups: GPTQ,
    arXiv:2210.17323]

    Args:
        x: [..., K] fp32, bf16 or fp16; last dimension contiguous.
        weight: [N, K] in int8 or int4, with or without zero-points, as ``quant.quantize`` returns it; rows may be
            strided.
        bias: [N] in x's dtype, or None.
    Returns:
        [..., N], dtype of x. Differentiable in x and bias; the weight is a constant.
    Numerics: on the CPU x is rounded to int8 as well, in groups: 128 inputs with int8 weights, the weight's own group
        with int4 (``quant.quantize_activations``), for integer dot products; an input that is not finite makes its
        row NaN. PyTorch's linear, where it is faster, takes x unrounded. On GPUs up to 16 tokens (GEMV) and int4
        weights take x unrounded; more tokens with int8 weights round each row of x with one scale. Sums in fp32 (int32
        within a group), one rounding. Gradients are those of the exact x.
    Raises: TypeError or ValueError for dtype, device, shape or stride; RuntimeError if scales need a gradient or a
    forced backend cannot run here.
    Example:
        >>> weight = qvl_kernels.quantization.quantize(torch.randn(10, 64), bits=8)
        >>> y = qvl_kernels.quantized_linear(torch.randn(3, 64), weight)
    """
    checks.check_tensor("quantized_linear", "x", x)
    if x.dim() < 1:
        raise ValueError("quantized_linear: x must have at least 1 dimension, got a scalar")
    quantization.check_weight("quantized_linear", weight, x.device)
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"quantized_linear: x must have the {weight.in_features} inputs of weight, got shape {tuple(x.shape)}"
        )
    if bias is not None:
        checks.check_tensor("quantized_linear", "bias", bias, 1)
        checks.check_shape("quantized_linear", "bias", bias, (weight.values.shape[0],))
    checks.check_same("quantized_linear", x=x, bias=bias)
    checks.check_last_contiguous("quantized_linear", x=x, bias=bias)
    if (
        dispatch.choose("quantized_linear", x.device, unsupported_scales(weight) or checks.unsupported_dtype(x))
        == "reference"
    ):
        return quantized_linear_reference(x, weight, bias)
    checks.check_no_gradient(
        "quantized_linear", 'has no gradient of scales; detach them, or use_backend("reference")', weight.scales
    )
    return call(quantized_linear_op, x, weight.values, weight.scales, weight.zeros, bias)
