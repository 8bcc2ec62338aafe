"""linear: public names."""

from qvl_kernels.ops.gemv.tiles import is_small_m
from qvl_kernels.ops.linear.api import linear

__all__ = ["is_small_m", "linear"]
