"""Reference of patch_embed: its definition in PyTorch operations."""

import torch

__all__ = ["patch_embed_reference"]


def patch_embed_reference(pixels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    patches = pixels.view(-1, *weight.shape[1:])
    return torch.nn.functional.conv3d(patches, weight, bias, stride=weight.shape[2:]).view(-1, weight.shape[0])
