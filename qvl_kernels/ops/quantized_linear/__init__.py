"""quantized_linear: public names."""

from qvl_kernels.ops.quantized_linear.api import quantized_linear

__all__ = ["quantized_linear"]
