"""cross_attention: public names."""

from qvl_kernels.ops.cross_attention.api import cross_attention

__all__ = ["cross_attention"]
