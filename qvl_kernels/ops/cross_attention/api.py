"""Public function: cross_attention."""

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.attention.api import check_qkv, dropout_seed, unsupported_case
from qvl_kernels.ops.attention.op import attention_op
from qvl_kernels.ops.cross_attention.reference import cross_attention_reference

__all__ = ["cross_attention"]


def _key_counts(kv_lens: torch.Tensor, batch: int, keys: int, device: torch.device) -> torch.Tensor:
    checks.check_dtype("cross_attention", "kv_lens", kv_lens, torch.int32, torch.int64)
    checks.check_shape("cross_attention", "kv_lens", kv_lens, (batch,))
    checks.check_device("cross_attention", "kv_lens", kv_lens, device)
    if not torch.compiler.is_compiling() and kv_lens.device.type == "cpu" and batch:
        low, high = int(kv_lens.min()), int(kv_lens.max())
        if low < 0 or high > keys:
            raise ValueError(f"cross_attention: kv_lens must lie in [0, {keys}] (the keys), got {low} to {high}")
    return kv_lens.to(torch.int64).contiguous()


def cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kv_lens: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Text queries attend to visual keys and values: softmax(q k^T scale) v over each sample's visible keys.

    Args:
        q: [B, T, H, D] text queries, fp32, bf16 or fp16; last dimension contiguous.
        k, v: [B, S, Hkv, D] visual keys and values, H a multiple of Hkv.
        kv_lens: int [B], visual tokens of each sample (a prefix of S); keys and values behind it may hold anything,
            NaN included.
        key_padding_mask: bool [B, S], True = visible; with kv_lens, a key must be visible in both.
        scale: default 1 / sqrt(D).
        dropout_p: probability of dropping an attention weight; on the CPU this runs on the reference.
    Returns:
        [B, T, H, D]; 0 for samples that see no visual token.
    Raises: TypeError or ValueError for bad arguments; RuntimeError if a forced backend cannot run here.
    Example:
        >>> q, kv = torch.randn(2, 5, 4, 64), torch.randn(2, 9, 4, 64)
        >>> out = qvl_kernels.cross_attention(q, kv, kv, kv_lens=torch.tensor([9, 4]))
    """
    check_qkv("cross_attention", q, k, v, 4)
    batch, keys = k.shape[0], k.shape[1]
    counts = None if kv_lens is None else _key_counts(kv_lens, batch, keys, q.device)
    if key_padding_mask is not None:
        checks.check_dtype("cross_attention", "key_padding_mask", key_padding_mask, torch.bool)
        checks.check_shape("cross_attention", "key_padding_mask", key_padding_mask, (batch, keys))
        checks.check_device("cross_attention", "key_padding_mask", key_padding_mask, q.device)
    dropout_p = checks.check_probability("cross_attention", "dropout_p", dropout_p)
    scale = checks.check_scale("cross_attention", scale, q.shape[-1])
    if dispatch.choose("cross_attention", q.device, unsupported_case(q, dropout_p)) == "reference":
        visible = key_padding_mask
        if counts is not None:
            prefix = torch.arange(keys, device=q.device)[None] < counts[:, None]
            visible = prefix if visible is None else visible & prefix
        return cross_attention_reference(q, k, v, visible, scale, dropout_p)
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    return call(attention_op, q, k, v, None, counts, mask, False, scale, dropout_p, dropout_seed(dropout_p, q.device))[
        0
    ]
