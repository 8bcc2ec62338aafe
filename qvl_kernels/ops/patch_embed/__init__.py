"""patch_embed: public names."""

from qvl_kernels.ops.patch_embed.api import patch_embed

__all__ = ["patch_embed"]
