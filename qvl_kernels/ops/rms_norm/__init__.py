"""rms_norm: public names."""

from qvl_kernels.ops.rms_norm.api import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
