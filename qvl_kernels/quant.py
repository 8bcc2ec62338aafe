"""Another name of ``qvl_kernels.quantization``, for code written with it."""

from qvl_kernels.quantization import GROUPS, QuantizedWeight, dequantize, quantize

__all__ = ["GROUPS", "QuantizedWeight", "dequantize", "quantize"]
