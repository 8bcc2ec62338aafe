"""Public function: decode_attention."""

from typing import Any

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.attention.api import MAX_HEAD_DIM, check_mask, check_qkv
from qvl_kernels.ops.decode_attention.op import decode_attention_op
from qvl_kernels.ops.decode_attention.reference import decode_attention_reference

__all__ = ["decode_attention"]


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    lengths: int | torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = softmax(q k^T scale + mask) v of a few queries per sequence over its KV cache. Inference only.

    Flash-decoding: the keys of long caches are split over programs or threads.

    Args:
        q: [B, T, H, D], the queries of the last T positions (T small), fp32, bf16 or fp16.
        k_cache, v_cache: [B, Hkv, S_cap, D], last dimension contiguous; only the first ``lengths`` keys are read.
        lengths: keys of each sequence, the T newest included: an int, or an int tensor [B].
        mask: None for causal (query i sees keys <= length - T + i); or bool / additive, broadcastable to
            [B, H, T, S_cap], which replaces the causal rule.
        scale: default 1 / sqrt(D).
        k_scale, v_scale: scales if the caches are int8: fp32, bf16 or fp16 [B, Hkv, S_cap], any strides. One scale per
            token and kv head, max |k| / 127 when it is written; key = int8 values * scale.
    Returns:
        [B, T, H, D], dtype of q. Rows that see no key give 0.
    Numerics: scores, softmax and sums in fp32; int8 keys and values times their scales are rounded to q's dtype.
        Lengths on a GPU are clamped to [0, S_cap]; on the CPU they are checked.
    Raises: TypeError or ValueError for bad arguments; RuntimeError under gradients or if a forced backend cannot run
    here.
    Example:
        >>> q, cache = torch.randn(2, 1, 4, 64), torch.randn(2, 2, 100, 64)
        >>> out = qvl_kernels.decode_attention(q, cache, cache, lengths=torch.tensor([100, 7]))
    """
    _check_caches(q, k_cache, v_cache, k_scale, v_scale)
    batch, capacity, queries = q.shape[0], k_cache.shape[2], q.shape[1]
    if not isinstance(lengths, torch.Tensor):
        length = checks.check_int("decode_attention", "lengths", lengths, queries, capacity)
        lengths = torch.full((batch,), length, dtype=torch.int64, device=q.device)
    checks.check_dtype("decode_attention", "lengths", lengths, torch.int32, torch.int64)
    checks.check_shape("decode_attention", "lengths", lengths, (batch,))
    checks.check_device("decode_attention", "lengths", lengths, q.device)
    if not torch.compiler.is_compiling() and lengths.device.type == "cpu" and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < queries or high > capacity:
            raise ValueError(
                f"decode_attention: lengths must lie in [{queries}, {capacity}] (queries to cache capacity), got "
                f"{low} to {high}"
            )
    if mask is not None:
        check_mask("decode_attention", mask, q, (batch, q.shape[2], queries, capacity))
    scale = checks.check_scale("decode_attention", scale, q.shape[-1])
    advice = "has no backward; call it under torch.no_grad(), or use attention to train"
    checks.check_no_gradient("decode_attention", advice, q, k_cache, v_cache, mask, k_scale, v_scale)
    unsupported = checks.unsupported_dtype(q)
    if q.shape[-1] > MAX_HEAD_DIM:
        unsupported = f"head_dim {q.shape[-1]} (at most {MAX_HEAD_DIM})"
    if dispatch.choose("decode_attention", q.device, unsupported) == "reference":
        return decode_attention_reference(q, k_cache, v_cache, lengths, mask, k_scale, v_scale, scale)
    return call(decode_attention_op, q, k_cache, v_cache, lengths, mask, k_scale, v_scale, scale)


def _check_caches(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    op = "decode_attention"
    if (k_scale is None) != (v_scale is None):
        raise ValueError(f"{op}: k_scale and v_scale must be given together")
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    checks.check_tensor(op, "q", q, 4)
    if k_scale is None:
        for name, x in caches.items():
            checks.check_tensor(op, name, x, 4)
        k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    else:
        for name, x in caches.items():
            checks.check_dtype(op, f"{name}, as scales are given,", x, torch.int8)
            if x.dim() != 4:
                raise ValueError(f"{op}: {name} must have shape [B, Hkv, S_cap, D], got {tuple(x.shape)}")
            checks.check_device(op, name, x, q.device)
        checks.check_shape(op, "v_cache", v_cache, tuple(k_cache.shape))
        scales: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale}
        for name, x in scales.items():
            checks.check_tensor(op, name, x, 3)
            checks.check_shape(op, name, x, tuple(k_cache.shape[:3]))
            checks.check_device(op, name, x, q.device)
        k = v = q.new_empty(k_cache.shape[3]).expand(
            k_cache.transpose(1, 2).shape
        )  # a placeholder of the caches' shape in q's dtype, for the check of q
    checks.check_last_contiguous(op, **caches)
    check_qkv(op, q, k, v, 4)
