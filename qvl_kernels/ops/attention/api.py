"""Public function: attention."""

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.attention.op import attention_op
from qvl_kernels.ops.attention.reference import attention_reference, varlen_attention_reference

__all__ = [
    "MAX_HEAD_DIM",
    "MAX_HEAD_DIM_GPU",
    "attention",
    "check_cu_seqlens",
    "check_mask",
    "check_qkv",
    "dropout_seed",
    "unsupported_case",
    "unsupported_heads",
]

MAX_HEAD_DIM = 512
MAX_HEAD_DIM_GPU = 256


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ndim: int) -> None:
    """Checks shapes, dtypes and strides of q [.., T, H, D] and k, v [.., S, Hkv, D]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(op, name, x, ndim)
    checks.check_same(op, q=q, k=k, v=v)
    checks.check_last_contiguous(op, q=q, k=k, v=v)
    checks.check_shape(op, "v", v, tuple(k.shape))
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{op}: q and k must have the same head_dim, got {q.shape[-1]} and {k.shape[-1]}")
    if q.shape[-1] < 1:
        raise ValueError(f"{op}: head_dim must be at least 1, got q of shape {tuple(q.shape)}")
    if k.shape[-2] < 1 or q.shape[-2] < 1 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{op}: query heads must be a multiple of key/value heads, got {q.shape[-2]} and {k.shape[-2]}"
        )
    if ndim == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"{op}: q and k must have the same batch size, got {q.shape[0]} and {k.shape[0]}")


def check_cu_seqlens(op: str, cu_seqlens: torch.Tensor, total: int, device: torch.device) -> None:
    """int32 [n + 1] that rises from 0 to ``total``: kernels would read outside the tensors otherwise."""
    checks.check_dtype(op, "cu_seqlens", cu_seqlens, torch.int32)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"{op}: cu_seqlens must have one dimension and at least 1 element (0), got shape {tuple(cu_seqlens.shape)}"
        )
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"{op}: cu_seqlens must be contiguous")
    if cu_seqlens.device.type != "cpu":
        checks.check_device(op, "cu_seqlens", cu_seqlens, device)
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
        return  # tracing has no values, and reading them from a GPU would synchronise
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in zip(bounds[:-1], bounds[1:])):
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to {total} (the total length), got {bounds[:4]}...{bounds[-1]}"
        )


def check_mask(op: str, mask: torch.Tensor, q: torch.Tensor, shape: tuple[int, int, int, int]) -> None:
    """The mask is bool or of q's dtype, [B, H, T, S] with 1 where it broadcasts."""
    checks.check_dtype(op, "mask", mask, torch.bool, q.dtype)
    if mask.dim() != 4 or any(size != 1 and size != full for size, full in zip(mask.shape, shape)):
        raise ValueError(f"{op}: mask must broadcast to [B, H, T, S] = {shape}, got {tuple(mask.shape)}")
    checks.check_device(op, "mask", mask, q.device)


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda or dispatch.forced() == "triton"  # forced: Triton's interpreter runs on CPU tensors


def unsupported_heads(x: torch.Tensor, head_dim: int) -> str | None:
    """Why the fast backend cannot run attention with this head_dim on the device and in the dtype of ``x``, or None."""
    limit = MAX_HEAD_DIM_GPU if _on_gpu(x) else MAX_HEAD_DIM
    return f"head_dim {head_dim} (at most {limit})" if head_dim > limit else checks.unsupported_dtype(x)


def unsupported_case(q: torch.Tensor, dropout_p: float) -> str | None:
    """Why the fast backend cannot run attention of ``q``, or None."""
    return unsupported_heads(q, q.shape[-1]) or ("dropout" if dropout_p > 0.0 and not _on_gpu(q) else None)


def dropout_seed(dropout_p: float, device: torch.device) -> torch.Tensor | None:
    """int64 [1] from PyTorch's generator of the device, or None without dropout.

    So ``torch.manual_seed`` and checkpointing reproduce the dropout keep mask.
    """
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device) if dropout_p > 0.0 else None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """out = softmax(q k^T scale + mask) v        [Vaswani et al. 2017, arXiv:1706.03762; FlashAttention-2,
    arXiv:2307.08691]

    Args:
        q: [B, T, H, D] fp32, bf16 or fp16; last dimension contiguous, other strides free. Varlen: [N, H, D].
        k, v: [B, S, Hkv, D], H a multiple of Hkv (grouped-query attention). Varlen: [N, Hkv, D].
        causal: query i sees keys <= S - T + i (bottom-right aligned). For T = 2, S = 4: rows 1110 and 1111.
        scale: of the scores; default 1 / sqrt(D).
        cu_seqlens: int32 [n + 1] on the CPU, prefix sum of lengths (varlen): each sequence attends to itself only.
        key_padding_mask: bool [B, S], True = visible. Masked keys and values may hold anything, NaN included.
        mask: bool (True = visible) or additive in q's dtype, broadcastable to [B, H, T, S]; on top of the others.
        dropout_p: probability of dropping an attention weight; on the CPU this runs on the reference, on GPUs it has no
            second derivative.
        return_lse: also return the log-sum-exp of each row.
    Returns:
        out as q, or (out, lse): lse fp32 [B, H, T] (varlen: [H, N]), natural logarithm. Rows that see no key
            give out 0 and lse -inf.
    Numerics: scores, softmax and sums in fp32; order is scale, additive mask, boolean masks, softmax.
    Raises: TypeError or ValueError for bad arguments; RuntimeError if a forced backend cannot run here.
    Example:
        >>> q, kv = torch.randn(1, 5, 4, 64), torch.randn(1, 5, 2, 64)
        >>> out = qvl_kernels.attention(q, kv, kv, causal=True)
    """
    varlen = cu_seqlens is not None
    check_qkv("attention", q, k, v, 3 if varlen else 4)
    if cu_seqlens is not None:
        if key_padding_mask is not None or mask is not None:
            raise ValueError(
                "attention: cu_seqlens excludes key_padding_mask and mask; varlen sequences have no padding"
            )
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"attention: varlen q and k must have the same length, got {q.shape[0]} and {k.shape[0]}")
        check_cu_seqlens("attention", cu_seqlens, q.shape[0], q.device)
    else:
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        if key_padding_mask is not None:
            checks.check_dtype("attention", "key_padding_mask", key_padding_mask, torch.bool)
            checks.check_shape("attention", "key_padding_mask", key_padding_mask, (shape[0], shape[3]))
            checks.check_device("attention", "key_padding_mask", key_padding_mask, q.device)
        if mask is not None:
            check_mask("attention", mask, q, shape)
    causal, return_lse = (
        checks.check_bool("attention", "causal", causal),
        checks.check_bool("attention", "return_lse", return_lse),
    )
    dropout_p = checks.check_probability("attention", "dropout_p", dropout_p)
    scale = checks.check_scale("attention", scale, q.shape[-1])
    if dispatch.choose("attention", q.device, unsupported_case(q, dropout_p)) == "reference":
        if cu_seqlens is not None:
            out, lse = varlen_attention_reference(q, k, v, cu_seqlens, causal=causal, scale=scale, dropout_p=dropout_p)
        else:
            out, lse = attention_reference(
                q, k, v, causal=causal, scale=scale, key_padding_mask=key_padding_mask, mask=mask, dropout_p=dropout_p
            )
    else:
        if key_padding_mask is not None:
            padding = key_padding_mask[:, None, None, :]
            if mask is None:
                mask = padding
            elif mask.dtype == torch.bool:
                mask = mask & padding
            else:
                mask = mask.masked_fill(~padding, float("-inf"))
        seed = dropout_seed(dropout_p, q.device)
        out, lse = call(attention_op, q, k, v, cu_seqlens, None, mask, causal, scale, dropout_p, seed)
    return (out, lse) if return_lse else out
