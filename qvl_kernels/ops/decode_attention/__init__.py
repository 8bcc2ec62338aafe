import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.ops.attention import MAX_HEAD_DIM, check_mask, check_qkv
from qvl_kernels.ops.attention.cpu import attention_op
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
) -> torch.Tensor:
    """The last few queries of each sequence against its key/value cache; long caches are split over keys. Inference only.

    Args:
        q: [B, T, H, D], the queries of the last T positions (T small), fp32, bf16 or fp16.
        k_cache, v_cache: [B, Hkv, S_cap, D], last dimension contiguous; only the first ``lengths`` keys are read.
        lengths: keys of each sequence, the T newest included: an int, or an int tensor [B].
        mask: None for causal (query i sees keys <= length - T + i); or bool / additive, broadcastable to
            [B, H, T, S_cap], which replaces the causal rule.
        scale: default 1 / sqrt(D).
    Returns:
        [B, T, H, D].
    Raises: TypeError or ValueError for bad arguments; RuntimeError under gradients or if a forced backend cannot run here.
    Example:
        >>> q, cache = torch.randn(2, 1, 4, 64), torch.randn(2, 2, 100, 64)
        >>> out = qvl_kernels.decode_attention(q, cache, cache, lengths=torch.tensor([100, 7]))
    """
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.check_tensor("decode_attention", name, x, 4)
    checks.check_last_contiguous("decode_attention", k_cache=k_cache, v_cache=v_cache)
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    check_qkv("decode_attention", q, k, v, 4)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("decode_attention has no backward; call it under torch.no_grad(), or use attention to train")
    batch, capacity, queries = q.shape[0], k.shape[1], q.shape[1]
    if isinstance(lengths, int):
        lengths = torch.full((batch,), lengths, dtype=torch.int64, device=q.device)
    elif not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError("decode_attention: lengths must be an int or an int32/int64 tensor [B]")
    checks.check_shape("decode_attention", "lengths", lengths, (batch,))
    checks.check_device("decode_attention", "lengths", lengths, q.device)
    if not torch.compiler.is_compiling() and lengths.device.type == "cpu" and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < queries or high > capacity:
            raise ValueError(
                f"decode_attention: lengths must lie in [{queries}, {capacity}] (queries to cache capacity), got {low} to {high}"
            )
    if mask is not None:
        check_mask("decode_attention", mask, q, (batch, q.shape[2], queries, capacity))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    unsupported = checks.unsupported_dtype(q)
    if q.shape[-1] > MAX_HEAD_DIM:
        unsupported = f"head_dim {q.shape[-1]} (at most {MAX_HEAD_DIM})"
    if dispatch.choose("decode_attention", q.device, unsupported) == "reference":
        return decode_attention_reference(q, k_cache, v_cache, lengths, mask, scale)
    return attention_op(q, k, v, None, lengths.to(torch.int64).contiguous(), mask, mask is None, scale)[0]
