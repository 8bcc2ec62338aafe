"""Reference of cross_attention: its definition in PyTorch operations."""

import torch

from qvl_kernels.ops.attention.reference import attention_reference

__all__ = ["cross_attention_reference"]


def cross_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, scale: float, dropout_p: float
) -> torch.Tensor:
    return attention_reference(q, k, v, causal=False, scale=scale, key_padding_mask=visible, dropout_p=dropout_p)[0]
