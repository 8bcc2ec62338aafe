"""torch op qvl::vision_block."""

import torch

from qvl_kernels.library import register
from qvl_kernels.ops.vision_block.cpu import vision_block_cpu
from qvl_kernels.ops.vision_block.unfused import unfused_vision_block

__all__ = ["vision_block_op"]

vision_block_op = register(
    "vision_block(Tensor x, Tensor[] norms, Tensor[] weights, Tensor[] biases, Tensor cos, Tensor sin, Tensor "
    "cu_seqlens,"
    " int num_heads, float eps) -> Tensor",
    cpu=vision_block_cpu,
    triton=unfused_vision_block,
    fake=lambda x, *rest: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
