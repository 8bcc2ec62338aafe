"""attention: public names."""

from qvl_kernels.ops.attention.api import attention

__all__ = ["attention"]
