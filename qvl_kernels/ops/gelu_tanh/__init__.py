"""gelu_tanh: public names."""

from qvl_kernels.ops.gelu_tanh.api import gelu_tanh

__all__ = ["gelu_tanh"]
