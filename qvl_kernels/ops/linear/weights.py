"""Handles of dense and quantised weights for the extension."""

from typing import Any

import torch

from qvl_kernels import dispatch, quantization
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["extension_weight", "out_features", "placeholder", "tensors_of", "unsupported_scales"]

DENSE, INT8, INT4 = range(3)  # as csrc/cpu/kernel_table.h


def extension_weight(weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None) -> Any:
    """The C++ handle (pointers and layout) of a checked weight; the tensors must outlive it."""
    bias_pointer = 0 if bias is None else bias.data_ptr()
    if isinstance(weight, torch.Tensor):
        return dispatch.extension().Weight(weight.data_ptr(), weight.stride(0), bias_pointer)
    values, scales, _, zeros = weight
    if scales.dtype not in ((torch.float32,) if weight.bits == 8 else quantization.SCALE_DTYPES):
        raise TypeError(
            f"the C++ kernels take fp32 scales of int8 and bf16 or fp16 scales of int4 weights, got {scales.dtype}"
        )
    return dispatch.extension().Weight(
        values.data_ptr(),
        values.stride(0),
        bias_pointer,
        INT8 if weight.bits == 8 else INT4,
        scales.data_ptr(),
        scales.stride(0),
        0 if weight.bits == 8 else weight.group,
        DTYPE_CODES[scales.dtype],
        0 if zeros is None else zeros.data_ptr(),
        0 if zeros is None else zeros.stride(0),
    )


def out_features(weight: torch.Tensor | QuantizedWeight) -> int:
    return (weight.values if isinstance(weight, QuantizedWeight) else weight).shape[0]


def tensors_of(weight: torch.Tensor | QuantizedWeight) -> tuple[torch.Tensor, ...]:
    """The tensors that hold a weight."""
    return weight.tensors if isinstance(weight, QuantizedWeight) else (weight,)


def unsupported_scales(*weights: torch.Tensor | QuantizedWeight | None) -> str | None:
    """Why the fast backends cannot take the scales of the weights, or None."""
    wide = any(isinstance(weight, QuantizedWeight) and weight.scales.dtype is torch.float64 for weight in weights)
    return "scales of torch.float64 (the tests' fp64 reference)" if wide else None


def placeholder(op: str, weight: torch.Tensor | QuantizedWeight | None, x: torch.Tensor) -> torch.Tensor | None:
    """A dense weight itself; for a quantised one, which is checked, an expanded tensor of its shape and x's dtype."""
    if not isinstance(weight, QuantizedWeight):
        return weight
    quantization.check_weight(op, weight, x.device)
    return x.new_empty(weight.in_features).expand(out_features(weight), weight.in_features)
