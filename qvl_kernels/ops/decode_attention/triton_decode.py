"""decode_attention as flash-decoding (split-KV): one kernel writes a partial softmax per split, a second combines them.

The number of splits depends on shapes only, so that one CUDA graph fits every length. The keys of a split follow from
the length on the device: short sequences use few splits, long ones share their keys evenly.
"""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu import features
from qvl_kernels.gpu.device import architecture
from qvl_kernels.gpu.device_functions import LOG2E, caches_of_table, griddepcontrol_wait, visible_of_table
from qvl_kernels.gpu.launch import launch
from qvl_kernels.gpu.tiles import cdiv
from qvl_kernels.gpu.views import HeadsView, MaskView, heads_view, mask_kind_and_view
from qvl_kernels.ops.decode_attention import tiles

__all__ = ["launch_decode_attention"]


@triton.jit
def _split_size(length, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys per split, in whole blocks; only the first cdiv(length, size) splits have keys."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N), 1) * BLOCK_N


@triton.jit
def _length_of(cache_seqlens_ptr, stride_length, batch, S):
    """The sequence's length, clamped to the cache's capacity: no value on the device leads outside it."""
    return tl.minimum(tl.maximum(tl.load(cache_seqlens_ptr + batch * stride_length), 0), S).to(tl.int32)


@triton.jit
def _decode_attention_kernel(
    q_view,
    k_view,
    v_view,
    k_scale_view,
    v_scale_view,
    mask_view,
    cache_seqlens_ptr,
    table_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    T,
    H,
    S,
    D,
    scale,
    stride_length,
    ROW_BLOCKS,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    MASK: tl.constexpr,
    PDL: tl.constexpr,
):
    """partial = softmax(q k^T scale + mask) v and its lse (base 2) over the keys of one split, by online softmax.

    The rows of a tile are the T queries of the GROUP query heads of one kv head: row r is query r // GROUP of head
    r % GROUP. MASK: 0 causal, 1 bool, 2 additive. HAS_TABLE: the addresses of caches and mask, and S, are read from a
    row of GrowingCaches.table.
    """
    griddepcontrol_wait(PDL)
    split = tl.program_id(0)
    kv_head, row_block = tl.program_id(1) // ROW_BLOCKS, tl.program_id(1) % ROW_BLOCKS
    batch = tl.program_id(2).to(tl.int64)
    if HAS_TABLE:
        k_ptr, v_ptr, S = caches_of_table(table_ptr, q_view.ptr)
        k_view = HeadsView(k_ptr, H // GROUP * S * D, D, S * D)
        v_view = HeadsView(v_ptr, k_view.stride_b, k_view.stride_t, k_view.stride_h)
        mask_ptr, mask_stride_b = visible_of_table(table_ptr)
        mask_view = MaskView(mask_ptr, mask_stride_b, mask_view.stride_h, mask_view.stride_t, mask_view.stride_s)
    length = _length_of(cache_seqlens_ptr, stride_length, batch, S)
    size = _split_size(length, SPLITS, BLOCK_N)
    begin = split * size
    if SPLITS > 1:
        if begin >= length:
            return
    end = tl.minimum(begin + size, length)

    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    t, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    offs_d, offs_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_rows, in_d = t < T, offs_d < D
    q_rows = batch * q_view.stride_b + t.to(tl.int64) * q_view.stride_t + head.to(tl.int64) * q_view.stride_h
    q = tl.load(
        q_view.ptr + q_rows[:, None] + offs_d[None, :], mask=in_rows[:, None] & in_d[None, :], other=0.0
    )  # [BLOCK_M, BLOCK_D]
    k_base = k_view.ptr + batch * k_view.stride_b + kv_head.to(tl.int64) * k_view.stride_h
    v_base = v_view.ptr + batch * v_view.stride_b + kv_head.to(tl.int64) * v_view.stride_h
    k_scale_base = k_scale_view.ptr + batch * k_scale_view.stride_b + kv_head.to(tl.int64) * k_scale_view.stride_h
    v_scale_base = v_scale_view.ptr + batch * v_scale_view.stride_b + kv_head.to(tl.int64) * v_scale_view.stride_h
    mask_rows = (
        batch * mask_view.stride_b + head.to(tl.int64) * mask_view.stride_h + t.to(tl.int64) * mask_view.stride_t
    )
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        keys = start + offs_n
        in_keys = keys < end
        wide_keys = keys.to(tl.int64)
        kv_mask = in_keys[:, None] & in_d[None, :]
        k = tl.load(
            k_base + wide_keys[:, None] * k_view.stride_t + offs_d[None, :], mask=kv_mask, other=0
        )  # [BLOCK_N, BLOCK_D]
        v = tl.load(
            v_base + wide_keys[:, None] * v_view.stride_t + offs_d[None, :], mask=kv_mask, other=0
        )  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * (scale * LOG2E)  # [BLOCK_M, BLOCK_N]
        if HAS_SCALES:
            scores *= tl.load(k_scale_base + wide_keys * k_scale_view.stride_t, mask=in_keys, other=0.0).to(tl.float32)[
                None, :
            ]
        visible = in_rows[:, None] & in_keys[None, :]
        if MASK == 0:
            visible = visible & (keys[None, :] <= (length - T + t)[:, None])
        else:
            mask = tl.load(
                mask_view.ptr + mask_rows[:, None] + wide_keys[None, :] * mask_view.stride_s, mask=visible, other=0
            )
            if MASK == 1:
                visible = visible & (mask != 0)
            else:
                scores += mask.to(tl.float32) * LOG2E
        scores = tl.where(visible, scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - m_safe[:, None])
        correction = tl.exp2(m_i - m_safe)
        l_i = l_i * correction + tl.sum(p, 1)
        if HAS_SCALES:  # v is scaled before rounding, not p: p times a small scale may underflow in fp16
            v_scale = tl.load(v_scale_base + wide_keys * v_scale_view.stride_t, mask=in_keys, other=0.0).to(tl.float32)
            v = (v.to(tl.float32) * v_scale[:, None]).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * correction[:, None], input_precision="ieee")
        m_i = m_new

    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]  # rows that see no key give 0
    flat = (batch * T + t) * H + head  # row of [B, T, H]
    out_mask = in_rows[:, None] & in_d[None, :]
    if SPLITS == 1:
        tl.store(out_ptr + flat[:, None] * D + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_mask)
    else:
        flat = flat * SPLITS + split
        tl.store(partial_ptr + flat[:, None] * D + offs_d[None, :], acc, mask=out_mask)
        lse = m_i + tl.log2(tl.where(l_i == 0.0, 1.0, l_i))  # -inf from m_i where no key is seen
        tl.store(lse_ptr + flat, lse, mask=in_rows)


@triton.jit
def _decode_attention_combine_kernel(
    partial_ptr,
    lse_ptr,
    cache_seqlens_ptr,
    table_ptr,
    out_ptr,
    rows_per_batch,
    S,
    D,
    stride_length,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = sum_s 2^(lse_s) partial_s / sum_s 2^(lse_s) of one row [B, T, H] over the splits that have keys."""
    griddepcontrol_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    if HAS_TABLE:
        S = tl.load(table_ptr + 2)
    length = _length_of(cache_seqlens_ptr, stride_length, row // rows_per_batch, S)
    used = tl.cdiv(length, _split_size(length, SPLITS, BLOCK_N))
    splits = tl.arange(0, SPLITS)
    lse = tl.load(lse_ptr + row * SPLITS + splits, mask=splits < used, other=float("-inf"))
    lse_max = tl.max(lse, 0)
    lse_max = tl.where(lse_max == float("-inf"), 0.0, lse_max)
    weight_sum = tl.sum(tl.exp2(lse - lse_max), 0)
    offs_s, offs_d = tl.arange(0, STEP), tl.arange(0, BLOCK_D)
    acc = tl.zeros([STEP, BLOCK_D], tl.float32)
    for start in range(0, used, STEP):
        s = start + offs_s
        lse_s = tl.load(lse_ptr + row * SPLITS + s, mask=s < used, other=float("-inf"))
        address = partial_ptr + (row * SPLITS + s)[:, None] * D + offs_d[None, :]
        part = tl.load(address, mask=(s < used)[:, None] & (offs_d < D)[None, :], other=0.0)  # [STEP, BLOCK_D]
        acc += tl.exp2(lse_s - lse_max)[:, None] * part
    out = tl.sum(acc, 0) / tl.where(weight_sum == 0.0, 1.0, weight_sum)
    tl.store(out_ptr + row * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)


def launch_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    scale: float,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    batch, queries, heads, head_dim = q.shape
    kv_heads, capacity = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    arch = architecture(q.device)
    planned = capacity if table is None else None
    tile = tiles.decode_attention(
        batch * kv_heads, group * queries, head_dim, q.element_size(), planned, arch, k_scale is not None
    )
    join_step, flags = tile.pop("COMBINE_STEP"), features.used("decoding", arch)
    splits, row_blocks = tile["SPLITS"], cdiv(group * queries, tile["BLOCK_M"])
    partial = lse = out
    if splits > 1:
        partial = torch.empty((batch, queries, heads, splits, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((batch, queries, heads, splits), dtype=torch.float32, device=q.device)
    if table is not None:  # a captured graph must not hold the caches' present addresses and capacity
        kind, masks, entry = 1, MaskView(q, 0, 0, 0, 1), table
        k_cache, v_cache, capacity = q, q, 0
    else:
        kind, masks = mask_kind_and_view(mask, (batch, heads, queries, capacity), q)
        entry = q
    k_scales = v_scales = HeadsView(q, 0, 0, 0)
    if k_scale is not None:
        k_scales, v_scales = (HeadsView(x, x.stride(0), x.stride(2), x.stride(1)) for x in (k_scale, v_scale))
    launch(
        _decode_attention_kernel,
        (splits, kv_heads * row_blocks, batch),
        q_view=heads_view(q),
        k_view=heads_view(k_cache.transpose(1, 2)),
        v_view=heads_view(v_cache.transpose(1, 2)),
        k_scale_view=k_scales,
        v_scale_view=v_scales,
        mask_view=masks,
        cache_seqlens_ptr=lengths,
        table_ptr=entry,
        out_ptr=out,
        partial_ptr=partial,
        lse_ptr=lse,
        T=queries,
        H=heads,
        S=capacity,
        D=head_dim,
        scale=scale,
        stride_length=lengths.stride(0),
        ROW_BLOCKS=row_blocks,
        GROUP=group,
        HAS_SCALES=k_scale is not None,
        HAS_TABLE=table is not None,
        MASK=kind,
        **flags,
        **tile,
    )
    if splits > 1:
        launch(
            _decode_attention_combine_kernel,
            (batch * queries * heads,),
            partial_ptr=partial,
            lse_ptr=lse,
            cache_seqlens_ptr=lengths,
            table_ptr=entry,
            out_ptr=out,
            rows_per_batch=queries * heads,
            S=capacity,
            D=head_dim,
            stride_length=lengths.stride(0),
            BLOCK_N=tile["BLOCK_N"],
            BLOCK_D=tile["BLOCK_D"],
            SPLITS=splits,
            STEP=join_step,
            HAS_TABLE=table is not None,
            num_warps=4,
            **flags,
        )
    return out
