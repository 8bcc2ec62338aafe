"""vision_block: public names."""

from qvl_kernels.ops.vision_block.api import VisionWeights, vision_block

__all__ = ["VisionWeights", "vision_block"]
