"""Kernel selection of attention on the CPU: the extension or PyTorch's flash attention."""

from collections.abc import Callable

import torch

from qvl_kernels import tuning
from qvl_kernels.ops.attention.extension import extension_attention
from qvl_kernels.ops.attention.pytorch import pytorch_attention

__all__ = ["attention_work", "use_pytorch"]

MIN_TOKENS = 256  # of a sequence; attention of fewer takes a small part of a layer's time
TOKENS = 400  # measured for all longer sequences; no whole number of tiles, as with most prompts and images


def use_pytorch(dtype: torch.dtype, queries: int, keys: int, head_dim: int, causal: bool, sequences: int = 1) -> bool:
    """Whether PyTorch attends without a mask, its causal mask being aligned at the first key.

    Args:
        queries, keys: of a sample, or of all ``sequences`` (varlen) together.
    """
    offered = (
        queries >= MIN_TOKENS * max(1, sequences)
        and keys >= 1
        and (queries == keys or not causal)
        and head_dim % tuning.TILE_K == 0
    )
    return offered and tuning.chosen(tuning.attention_kind(dtype, causal)) == tuning.PYTORCH


def attention_work(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, *, causal: bool) -> tuning.Work:
    """Attention of one sequence, for ``tuning.settle``; slices have fewer heads."""

    def calls(size: int) -> dict[str, Callable[[], object]]:
        q, k = (torch.full((1, TOKENS, h, head_dim), 0.01, dtype=dtype) for h in (size * heads // kv_heads, size))
        scale = head_dim**-0.5
        return {
            tuning.QVL: lambda: extension_attention(q, k, k, None, None, None, causal, scale),
            tuning.PYTORCH: lambda: pytorch_attention(q, k, k, None, causal, scale),
        }

    shape = f"{TOKENS} tokens, {heads} and {kv_heads} heads of {head_dim}"
    return tuning.Work(tuning.attention_kind(dtype, causal), shape, kv_heads, calls)
