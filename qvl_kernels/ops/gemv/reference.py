"""Reference of the GEMV ops in PyTorch operations; also their CPU kernels."""

import torch

from qvl_kernels.quantization import QuantizedWeight, dequantize

__all__ = ["gemv_reference", "gemv_swiglu_reference", "quantized_gemv_reference", "quantized_gemv_swiglu_reference"]


def _rms_normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def gemv_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    y = torch.nn.functional.linear(_rms_normed(x, norm_weight, eps), weight, bias)
    return y if residual is None else y + residual


def gemv_swiglu_reference(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, norm_weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    normed = _rms_normed(x, norm_weight, eps)
    return torch.nn.functional.silu(torch.nn.functional.linear(normed, gate)) * torch.nn.functional.linear(normed, up)


def _dequantized(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    return dequantize(QuantizedWeight(values, scales, x.shape[-1], zeros), x.dtype)


def quantized_gemv_reference(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return gemv_reference(x, _dequantized(values, scales, zeros, x), bias, norm_weight, eps, residual)


def quantized_gemv_swiglu_reference(
    x: torch.Tensor,
    gate_values: torch.Tensor,
    gate_scales: torch.Tensor,
    gate_zeros: torch.Tensor | None,
    up_values: torch.Tensor,
    up_scales: torch.Tensor,
    up_zeros: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    gate = _dequantized(gate_values, gate_scales, gate_zeros, x)
    return gemv_swiglu_reference(x, gate, _dequantized(up_values, up_scales, up_zeros, x), norm_weight, eps)
