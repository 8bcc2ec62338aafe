"""qk_norm_rope and vision_rope: public names."""

from qvl_kernels.ops.rope.api import qk_norm_rope, vision_rope

__all__ = ["qk_norm_rope", "vision_rope"]
