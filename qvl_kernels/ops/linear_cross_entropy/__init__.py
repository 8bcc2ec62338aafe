"""linear_cross_entropy: public names."""

from qvl_kernels.ops.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
