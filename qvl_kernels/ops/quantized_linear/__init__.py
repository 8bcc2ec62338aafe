import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.ops.quantized_linear.op import quantized_linear_op
from qvl_kernels.ops.quantized_linear.reference import quantized_linear_reference
from qvl_kernels.quant import GROUPS, QuantizedWeight

__all__ = ["quantized_linear"]


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x @ dequantize(weight).T + bias        [int8 rows: LLM.int8, arXiv:2208.07339; int4 groups: GPTQ, arXiv:2210.17323]

    Args:
        x: [..., K] fp32, bf16 or fp16; last dimension contiguous.
        weight: [N, K] in int8 or int4 as ``quant.quantize`` returns it; rows may be strided.
        bias: [N] in x's dtype, or None.
    Returns:
        [..., N], dtype of x. Differentiable in x and bias; the weight is a constant.
    Numerics: at most 16 rows multiply x as it is. More rows (prefill) of int8 weights round each row of x to int8 as well, with
        the scale max |x| / 127 of that row, so that the product runs on integer units; their gradient is that of the exact x.
        int4 always multiplies x as it is. Sums in fp32 (int32 for int8 times int8), one rounding.
    Raises: TypeError or ValueError for dtype, device, shape or stride; RuntimeError if a forced backend cannot run here.
    Example:
        >>> weight = qvl_kernels.quant.quantize(torch.randn(10, 64), bits=8)
        >>> y = qvl_kernels.quantized_linear(torch.randn(3, 64), weight)
    """
    checks.check_tensor("quantized_linear", "x", x)
    if x.dim() < 1:
        raise ValueError("quantized_linear: x must have at least 1 dimension, got a scalar")
    _check_weight(weight, x)
    if bias is not None:
        checks.check_tensor("quantized_linear", "bias", bias, 1)
        checks.check_shape("quantized_linear", "bias", bias, (weight.values.shape[0],))
    checks.check_same("quantized_linear", x=x, bias=bias)
    checks.check_last_contiguous("quantized_linear", x=x, values=weight.values, scales=weight.scales, bias=bias)
    if dispatch.choose("quantized_linear", x.device, checks.unsupported_dtype(x)) == "reference":
        return quantized_linear_reference(x, weight, bias)
    return quantized_linear_op(x, weight.values, weight.scales, bias)


def _check_weight(weight: QuantizedWeight, x: torch.Tensor) -> None:
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"quantized_linear: weight must be a quant.QuantizedWeight, got {type(weight).__name__}; see quant.quantize")
    values, scales, size = weight
    for name, part in (("values", values), ("scales", scales)):
        if not isinstance(part, torch.Tensor) or part.dim() != 2:
            raise TypeError(f"quantized_linear: weight.{name} must be a matrix, got {getattr(part, 'shape', type(part).__name__)}")
        checks.check_device("quantized_linear", f"weight.{name}", part, x.device)
    if size < 1 or x.shape[-1] != size:
        raise ValueError(f"quantized_linear: x must have the {size} inputs of weight (at least 1), got shape {tuple(x.shape)}")
    # float64 scales are the tests' truth and taken by the reference only
    if values.dtype == torch.int8 and scales.dtype in (torch.float32, torch.float64):
        checks.check_shape("quantized_linear", "weight.values", values, (values.shape[0], size))
        checks.check_shape("quantized_linear", "weight.scales", scales, (values.shape[0], 1))
    elif values.dtype == torch.uint8 and scales.dtype in (torch.bfloat16, torch.float64):
        groups, rest = divmod(2 * values.shape[1], max(1, scales.shape[1]))
        if scales.shape[0] != values.shape[0] or rest or groups not in GROUPS or scales.shape[1] != -(-size // groups):
            raise ValueError(
                f"quantized_linear: int4 values {tuple(values.shape)} and scales {tuple(scales.shape)} do not describe rows of {size}"
                f" inputs in groups of {', '.join(map(str, GROUPS))}"
            )
    else:
        raise TypeError(
            "quantized_linear: weight must be int8 values with fp32 scales or uint8 values with bf16 scales, got "
            f"{values.dtype} and {scales.dtype}"
        )
