"""swiglu: public names."""

from qvl_kernels.ops.swiglu.api import swiglu

__all__ = ["swiglu"]
