"""Alias of ``qvl_kernels.quantization``."""

from qvl_kernels.quantization import GROUPS, QuantizedWeight, dequantize, quantize

__all__ = ["GROUPS", "QuantizedWeight", "dequantize", "quantize"]
