"""qk_norm_rope, vision_rope, their backward, and qk_norm_rope_to_cache, which writes keys and values to the KV cache.

A program takes some heads of one token, with both halves of each head in registers: read once, written once. The first
blocks of heads belong to q, the others to k (and v).
"""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu import features
from qvl_kernels.gpu.device import architecture
from qvl_kernels.gpu.device_functions import caches_of_table, griddepcontrol_wait
from qvl_kernels.gpu.launch import launch
from qvl_kernels.gpu.tiles import PARTIAL_SUMS, cdiv
from qvl_kernels.gpu.views import HeadsView, cos_sin_view, heads_view
from qvl_kernels.ops.rope import tiles

__all__ = [
    "launch_qk_norm_rope",
    "launch_qk_norm_rope_backward",
    "launch_qk_norm_rope_to_cache",
    "launch_vision_rope",
    "launch_vision_rope_backward",
]


@triton.jit
def _halves(ptr, mask, half):
    """The low and high halves of the heads at ``ptr``, in fp32, each of ``mask``'s shape."""
    low = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(ptr + half, mask=mask, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _store_halves(ptr, low, high, mask, half):
    """Stores the halves of heads at ``ptr``, in its dtype."""
    tl.store(ptr, low.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + half, high.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotated(low, high, cos_ptr, sin_ptr, offs, half, TRANSPOSED: tl.constexpr):
    """x cos + rotate_half(x) sin, rotate_half(low, high) = (-high, low); or, if TRANSPOSED, the transposed map."""
    cos_low, cos_high = _halves(cos_ptr + offs, offs < half, half)  # [BLOCK]
    sin_low, sin_high = _halves(sin_ptr + offs, offs < half, half)
    if TRANSPOSED:
        sin_low, sin_high = -sin_high, -sin_low
    new_low = low * cos_low[None, :] - high * sin_low[None, :]
    new_high = high * cos_high[None, :] + low * sin_high[None, :]
    return new_low, new_high


@triton.jit
def _rotate_heads(
    x_ptr,
    stride_xh,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    stride_yh,
    first,
    count,
    half,
    eps,
    HAS_NORM: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = rope(x / sqrt(mean(x^2) + eps) weight), or of x itself, of heads [first, first + ROWS) of a token."""
    heads, offs = first + tl.arange(0, ROWS).to(tl.int64), tl.arange(0, BLOCK)
    mask = (heads < count)[:, None] & (offs < half)[None, :]
    low, high = _halves(x_ptr + heads[:, None] * stride_xh + offs[None, :], mask, half)  # [ROWS, BLOCK]
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * half) + eps)  # [ROWS]
        weight_low, weight_high = _halves(weight_ptr + offs, offs < half, half)
        low, high = low * scale[:, None] * weight_low[None, :], high * scale[:, None] * weight_high[None, :]
    low, high = _rotated(low, high, cos_ptr, sin_ptr, offs, half, TRANSPOSED)
    _store_halves(y_ptr + heads[:, None] * stride_yh + offs[None, :], low, high, mask, half)


@triton.jit(do_not_specialize=["past"])
def _rope_kernel(
    q,
    k,
    v,
    q_weight_ptr,
    k_weight_ptr,
    cos,
    sin,
    cache_seqlens_ptr,
    q_out_ptr,
    k_out,
    v_out,
    table_ptr,
    T,
    H,
    HKV,
    S,
    half,
    eps,
    past,
    stride_length,
    HAS_NORM: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = x cos + rotate_half(x) sin of q and k, with HAS_NORM of their RMS norm, for some heads of one token.

    k, and v unchanged, are written at position past + length of the row + t; nothing is written outside [0, S).
    HAS_TABLE: the addresses of the caches, and S, are read from a row of GrowingCaches.table.
    """
    griddepcontrol_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    batch, t = token // T, token % T
    block, q_blocks = tl.program_id(1), tl.cdiv(H, ROWS)
    if HAS_TABLE:  # not in the branch below, as both branches must keep the variables' types
        k_out_ptr, v_out_ptr, S = caches_of_table(table_ptr, q.ptr)
        k_out = HeadsView(k_out_ptr, HKV * S * 2 * half, 2 * half, S * 2 * half)
        v_out = HeadsView(v_out_ptr, k_out.stride_b, k_out.stride_t, k_out.stride_h)
    cos_ptr = cos.ptr + (batch * cos.stride_b + t * cos.stride_t)
    sin_ptr = sin.ptr + (batch * sin.stride_b + t * sin.stride_t)
    if block < q_blocks:
        _rotate_heads(
            q.ptr + batch * q.stride_b + t * q.stride_t,
            q.stride_h,
            q_weight_ptr,
            cos_ptr,
            sin_ptr,
            q_out_ptr + token * H * 2 * half,
            2 * half,
            block * ROWS,
            H,
            half,
            eps,
            HAS_NORM,
            TRANSPOSED,
            ROWS,
            BLOCK,
        )
    else:
        first = (block - q_blocks) * ROWS
        position = past + t
        if HAS_LENGTHS:
            position += tl.load(cache_seqlens_ptr + batch * stride_length).to(tl.int64)
        count = tl.where((position >= 0) & (position < S), HKV, 0)
        _rotate_heads(
            k.ptr + batch * k.stride_b + t * k.stride_t,
            k.stride_h,
            k_weight_ptr,
            cos_ptr,
            sin_ptr,
            k_out.ptr + batch * k_out.stride_b + position * k_out.stride_t,
            k_out.stride_h,
            first,
            count,
            half,
            eps,
            HAS_NORM,
            TRANSPOSED,
            ROWS,
            BLOCK,
        )
        if HAS_V:
            heads, offs = first + tl.arange(0, ROWS).to(tl.int64), tl.arange(0, BLOCK)
            mask = (heads < count)[:, None] & (offs < half)[None, :]
            low, high = _halves(
                v.ptr + batch * v.stride_b + t * v.stride_t + heads[:, None] * v.stride_h + offs[None, :], mask, half
            )
            out_ptr = v_out.ptr + batch * v_out.stride_b + position * v_out.stride_t
            _store_halves(out_ptr + heads[:, None] * v_out.stride_h + offs[None, :], low, high, mask, half)


@triton.jit
def _head_gradients(
    grad,
    x,
    weight_ptr,
    cos,
    sin,
    dx_ptr,
    dweight_ptr,
    first,
    count,
    tokens,
    T,
    half,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of some heads of every num_programs-th token, and their part of the norm's dweight.

    With r = rsqrt(mean(x^2) + eps), n = x r, g = rope^T(grad) weight: dx = r (g - n mean(g n)), dweight =
    sum(rope^T(grad) n); dx is computed as in rms_norm's backward, without cancellation.
    """
    heads, offs = first + tl.arange(0, ROWS).to(tl.int64), tl.arange(0, BLOCK)
    mask = (heads < count)[:, None] & (offs < half)[None, :]
    weight_low, weight_high = _halves(weight_ptr + offs, offs < half, half)
    dweight_low, dweight_high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    size = 2 * half
    for index in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        batch, t = token // T, token % T
        low, high = _halves(
            x.ptr + batch * x.stride_b + t * x.stride_t + heads[:, None] * x.stride_h + offs[None, :], mask, half
        )  # [ROWS, BLOCK]
        grad_low, grad_high = _halves(
            grad.ptr + batch * grad.stride_b + t * grad.stride_t + heads[:, None] * grad.stride_h + offs[None, :],
            mask,
            half,
        )  # [ROWS, BLOCK]
        grad_low, grad_high = _rotated(
            grad_low,
            grad_high,
            cos.ptr + batch * cos.stride_b + t * cos.stride_t,
            sin.ptr + batch * sin.stride_b + t * sin.stride_t,
            offs,
            half,
            True,
        )
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / size + eps)[:, None]
        low, high = low * scale, high * scale
        dweight_low += tl.sum(grad_low * low, 0)
        dweight_high += tl.sum(grad_high * high, 0)
        grad_low, grad_high = grad_low * weight_low[None, :], grad_high * weight_high[None, :]
        squares_low, squares_high, products_low, products_high = (
            low * low,
            high * high,
            grad_low * low,
            grad_high * high,
        )
        squares = (tl.sum(squares_low, 1) + tl.sum(squares_high, 1))[:, None]
        products = (tl.sum(products_low, 1) + tl.sum(products_high, 1))[:, None]
        rest = eps * scale * scale
        dx_low = scale * (grad_low * ((squares - squares_low) / size + rest) - low * ((products - products_low) / size))
        dx_high = scale * (
            grad_high * ((squares - squares_high) / size + rest) - high * ((products - products_high) / size)
        )
        _store_halves(dx_ptr + (token * count + heads[:, None]) * size + offs[None, :], dx_low, dx_high, mask, half)
    _store_halves(dweight_ptr + offs, dweight_low, dweight_high, offs < half, half)


@triton.jit
def _qk_norm_rope_backward_kernel(
    grad_q,
    grad_k,
    q,
    k,
    q_weight_ptr,
    k_weight_ptr,
    cos,
    sin,
    dq_ptr,
    dk_ptr,
    dweight_ptr,
    tokens,
    T,
    H,
    HKV,
    half,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dq, dk and partial sums of the norm weights' gradients [num_programs(0), num_programs(1), D], q's blocks of heads
    before k's; formulas in ``_head_gradients``.
    """
    block, q_blocks = tl.program_id(1), tl.cdiv(H, ROWS)
    dweight_ptr += (tl.program_id(0) * tl.num_programs(1) + block).to(tl.int64) * 2 * half
    if block < q_blocks:
        _head_gradients(
            grad_q,
            q,
            q_weight_ptr,
            cos,
            sin,
            dq_ptr,
            dweight_ptr,
            block * ROWS,
            H,
            tokens,
            T,
            half,
            eps,
            ROWS,
            BLOCK,
        )
    else:
        _head_gradients(
            grad_k,
            k,
            k_weight_ptr,
            cos,
            sin,
            dk_ptr,
            dweight_ptr,
            (block - q_blocks) * ROWS,
            HKV,
            tokens,
            T,
            half,
            eps,
            ROWS,
            BLOCK,
        )


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    lengths: torch.Tensor | None,
    past: int,
    eps: float,
    *,
    transposed: bool = False,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the rotated q; writes k_out and v_out.

    q, k, v: [B, T, heads, D]. k_out, v_out: [B, heads, S, D], or the caches that ``table`` holds when the kernel runs.
    """
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    batch, time, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    tile = tiles.rope(heads, kv_heads, head_dim // 2)
    values, v_out = (k, k_out) if v is None else (v, v_out)
    if table is not None:  # a captured graph must not hold the caches' present addresses and capacity
        k_out = v_out = q
    q_weight, k_weight = (q, k) if weights is None else weights
    launch(
        _rope_kernel,
        (batch * time, cdiv(heads, tile["ROWS"]) + cdiv(kv_heads, tile["ROWS"])),
        q=heads_view(q),
        k=heads_view(k),
        v=heads_view(values),
        q_weight_ptr=q_weight,
        k_weight_ptr=k_weight,
        cos=cos_sin_view(cos),
        sin=cos_sin_view(sin),
        cache_seqlens_ptr=q if lengths is None else lengths,
        q_out_ptr=q_out,
        k_out=heads_view(k_out.transpose(1, 2)),
        v_out=heads_view(v_out.transpose(1, 2)),
        table_ptr=q if table is None else table,
        T=time,
        H=heads,
        HKV=kv_heads,
        S=k_out.shape[2],
        half=head_dim // 2,
        eps=eps,
        past=past,
        stride_length=0 if lengths is None else lengths.stride(0),
        HAS_NORM=weights is not None,
        TRANSPOSED=transposed,
        HAS_V=v is not None,
        HAS_LENGTHS=lengths is not None,
        HAS_TABLE=table is not None,
        **features.used("decoding", architecture(q.device)),
        **tile,
    )
    return q_out


def launch_qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    return _forward(q, k, None, (q_weight, k_weight), cos, sin, k_out.transpose(1, 2), None, None, 0, eps), k_out


def launch_qk_norm_rope_to_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor | None,
    past: int,
    eps: float,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    return _forward(q, k, v, (q_weight, k_weight), cos, sin, k_cache, v_cache, lengths, past, eps, table=table)


def launch_vision_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _vision(q, k, cos, sin, transposed=False)


def launch_vision_rope_backward(
    grad_q: torch.Tensor, grad_k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _vision(_last_contiguous(grad_q), _last_contiguous(grad_k), cos, sin, transposed=True)


def _vision(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    q_out = _forward(
        q[None],
        k[None],
        None,
        None,
        cos[None],
        sin[None],
        k_out[None].transpose(1, 2),
        None,
        None,
        0,
        0.0,
        transposed=transposed,
    )
    return q_out[0], k_out


def launch_qk_norm_rope_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_q, grad_k = _last_contiguous(grad_q), _last_contiguous(grad_k)
    dq, dk = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)
    batch, time, heads, head_dim = q.shape
    kv_heads, tokens = k.shape[2], batch * time
    tile = tiles.rope(heads, kv_heads, head_dim // 2)
    q_blocks, k_blocks = cdiv(heads, tile["ROWS"]), cdiv(kv_heads, tile["ROWS"])
    programs = min(tokens, 4 * PARTIAL_SUMS)  # each takes few heads
    partial = torch.empty((programs, q_blocks + k_blocks, head_dim), dtype=torch.float32, device=q.device)
    launch(
        _qk_norm_rope_backward_kernel,
        (programs, q_blocks + k_blocks),
        grad_q=heads_view(grad_q),
        grad_k=heads_view(grad_k),
        q=heads_view(q),
        k=heads_view(k),
        q_weight_ptr=q_weight,
        k_weight_ptr=k_weight,
        cos=cos_sin_view(cos),
        sin=cos_sin_view(sin),
        dq_ptr=dq,
        dk_ptr=dk,
        dweight_ptr=partial,
        tokens=tokens,
        T=time,
        H=heads,
        HKV=kv_heads,
        half=head_dim // 2,
        eps=eps,
        **tile,
        enable_fp_fusion=False,  # as for rms_norm
    )
    return (
        dq,
        dk,
        partial[:, :q_blocks].sum((0, 1)).to(q_weight.dtype),
        partial[:, q_blocks:].sum((0, 1)).to(k_weight.dtype),
    )
