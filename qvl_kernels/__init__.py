"""Kernels for Qwen3-VL on CPU and GPU: public functions, each with a reference and fast backends. Knows tensors, not models."""

from qvl_kernels.dispatch import backends, cpu_info, fallbacks, use_backend
from qvl_kernels.ops.linear import linear
from qvl_kernels.ops.rms_norm import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "backends", "cpu_info", "fallbacks", "linear", "rms_norm", "use_backend"]
