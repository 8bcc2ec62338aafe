"""decode_attention: public names."""

from qvl_kernels.ops.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
