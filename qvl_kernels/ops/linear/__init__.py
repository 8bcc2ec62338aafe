"""linear: public names."""

from qvl_kernels.ops.gemv.tiles import few_rows
from qvl_kernels.ops.linear.api import linear

__all__ = ["few_rows", "linear"]
