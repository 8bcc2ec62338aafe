"""Public function: patch_embed."""

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.linear.op import linear_op
from qvl_kernels.ops.patch_embed.reference import patch_embed_reference

__all__ = ["patch_embed"]


def patch_embed(pixels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = pixels @ weight.flatten(1).T + bias: a Conv3d with kernel == stride as a GEMM
    [Qwen3VLVisionPatchEmbed; pytorch #174051]

    Args:
        pixels: [N, C * pt * p * p] flattened patches, fp32, bf16 or fp16; last dimension contiguous.
        weight: [E, C, pt, p, p] contiguous Conv3d weight, same dtype.
        bias: [E] or None.
    Returns:
        [N, E].
    Raises: TypeError or ValueError for bad arguments; RuntimeError if a forced backend cannot run here.
    Example:
        >>> y = qvl_kernels.patch_embed(torch.randn(4, 3 * 2 * 16 * 16), torch.randn(64, 3, 2, 16, 16))
    """
    checks.check_tensor("patch_embed", "pixels", pixels, 2)
    checks.check_tensor("patch_embed", "weight", weight, 5)
    if min(weight.shape) < 1:
        raise ValueError(f"patch_embed: weight must have elements, got shape {tuple(weight.shape)}")
    if not weight.is_contiguous():
        raise ValueError("patch_embed: weight must be contiguous; call weight.contiguous() first")
    checks.check_shape("patch_embed", "pixels", pixels, (pixels.shape[0], weight.shape[1:].numel()))
    if bias is not None:
        checks.check_tensor("patch_embed", "bias", bias, 1)
        checks.check_shape("patch_embed", "bias", bias, (weight.shape[0],))
    checks.check_same("patch_embed", pixels=pixels, weight=weight, bias=bias)
    checks.check_last_contiguous("patch_embed", pixels=pixels, bias=bias)
    if dispatch.choose("patch_embed", pixels.device, checks.unsupported_dtype(pixels)) == "reference":
        return patch_embed_reference(pixels, weight, bias)
    return call(linear_op, pixels, weight.view(weight.shape[0], -1), bias)
