"""Flash attention, forward: one program per block of queries and head, online softmax over blocks of keys."""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu import features
from qvl_kernels.gpu.device import architecture
from qvl_kernels.gpu.device_functions import LOG2E
from qvl_kernels.gpu.launch import launch, make_descriptors
from qvl_kernels.gpu.views import heads_view
from qvl_kernels.ops.attention import tiles
from qvl_kernels.ops.attention.triton_arguments import LENGTHS, Layout
from qvl_kernels.ops.attention.triton_device_functions import (
    Dropout,
    block_coordinates,
    dropout_keep_mask,
    head_mask,
    head_view,
    key_range,
    load_tile,
    load_tma_tile,
    masked_scores,
    visible_keys,
    zero_masked_keys,
)

__all__ = ["launch_attention"]


@triton.jit
def _attend(
    q,
    state,
    begin,
    end,
    k_view,
    v_view,
    mask,
    block,
    scale,
    dropout,
    mode: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POSITIVE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """One pass of online softmax over keys [begin, end): ``state`` is (acc = p v, l_i = row sum, m_i = row maximum).

    PARTIAL: some keys may be masked; else all rows see all of them.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    acc, l_i, m_i = state
    offs_m = block.start + tl.arange(0, q.shape[0])
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if not DESCRIPTORS:
        k_offsets = offs_n[:, None] * k_view.stride_t + offs_d[None, :]
        v_offsets = offs_n[:, None] * v_view.stride_t + offs_d[None, :]
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        wide_start, cols = start.to(tl.int64), start + offs_n
        key_visible, bias = visible_keys(mask, cols, block.keys, mode)
        if DESCRIPTORS:
            row, kv_head = block.first + start, block.head // mode.GROUP
            k = load_tma_tile(k_view, block.batch, row, kv_head, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            v = load_tma_tile(v_view, block.batch, row, kv_head, BLOCK_N, BLOCK_D)
            if PARTIAL:  # TMA also loads what follows the last key: another sequence, or NaN
                v = tl.where(key_visible[:, None], v, 0.0)
        else:
            k_pointers = k_view.ptr + wide_start * k_view.stride_t + k_offsets
            v_pointers = v_view.ptr + wide_start * v_view.stride_t + v_offsets
            k = load_tile(k_pointers, key_visible, mode.HEAD_DIM, PARTIAL)  # [BLOCK_N, BLOCK_D]
            v = load_tile(v_pointers, key_visible, mode.HEAD_DIM, PARTIAL)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        # Where nothing is masked, a positive scale is folded into the subtraction of the row maximum.
        FOLDED: tl.constexpr = POSITIVE and not PARTIAL
        if not FOLDED:
            scores = scores * scale
        if PARTIAL:
            scores, visible = masked_scores(
                scores, offs_m[:, None], cols[None, :], key_visible[None, :], bias[None, :], mask, block, mode
            )
            if mode.MASK_ROWS:
                v = zero_masked_keys(v, visible)
            scores = tl.where(visible, scores, float("-inf"))
        largest = tl.max(scores, 1)
        m_new = tl.maximum(m_i, largest * scale if FOLDED else largest)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((scores * scale if FOLDED else scores) - m_safe[:, None])
        correction = tl.exp2(m_i - m_safe)
        l_i = l_i * correction + tl.sum(p, 1)
        if mode.DROPOUT:
            keep = dropout_keep_mask(dropout, (dropout.first_row + offs_m)[:, None], cols[None, :], block.head)
            p = tl.where(keep, p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=LENGTHS)
def _attention_kernel(
    q_view,
    k_view,
    v_view,
    out_ptr,
    lse_ptr,
    mask_view,
    cu_seqlens_ptr,
    key_counts_ptr,
    seed_ptr,
    T,
    S,
    H,
    sequences,
    scale,
    threshold,
    keep_scale,
    mode: tl.constexpr,
    POSITIVE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = softmax(q k^T scale + mask) v and the log-sum-exp of its rows, for BLOCK_M queries of one head.

    ``scale`` includes log2(e). DESCRIPTORS: k_view and v_view are tensor descriptors of [B, S, Hkv, D], not views.
    """
    block = block_coordinates(cu_seqlens_ptr, key_counts_ptr, sequences, T, S, H, mode, BLOCK_M, False)
    if block.start >= block.queries:
        return
    tile_rows, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    offs_m = block.start + tile_rows
    in_rows = offs_m < block.queries
    head, first = block.head.to(tl.int64), block.first.to(tl.int64) if mode.VARLEN else 0
    row = first + block.start.to(tl.int64)  # offsets inside a tile are 32-bit
    q_view = head_view(q_view, block.batch, head, row)
    if not DESCRIPTORS:
        k_view = head_view(k_view, block.batch, head // mode.GROUP, first)
        v_view = head_view(v_view, block.batch, head // mode.GROUP, first)
    mask = head_mask(mask_view, block.batch, head)
    seed = tl.load(seed_ptr) if mode.DROPOUT else 0
    dropout = Dropout(seed, threshold, keep_scale, block.batch.to(tl.int32) * T + block.first)
    q_pointers = q_view.ptr + tile_rows[:, None] * q_view.stride_t + offs_d[None, :]
    q = load_tile(q_pointers, in_rows, mode.HEAD_DIM, True)  # [BLOCK_M, BLOCK_D]

    l_i, m_i = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    state = (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), l_i, m_i)
    full, end = key_range(block, mode, BLOCK_M, BLOCK_N)
    if mode.MASK == 0:
        state = _attend(
            q, state, 0, full, k_view, v_view, mask, block, scale, dropout, mode, BLOCK_N, POSITIVE, DESCRIPTORS, False
        )
    state = _attend(
        q, state, full, end, k_view, v_view, mask, block, scale, dropout, mode, BLOCK_N, POSITIVE, DESCRIPTORS, True
    )

    acc, l_i, m_i = state
    total = tl.where(l_i == 0.0, 1.0, l_i)  # rows without keys give out 0, and lse -inf from m_i
    acc = acc * ((keep_scale if mode.DROPOUT else 1.0) / total)[:, None]
    out_ptr += ((block.batch * T + row) * H + block.head) * mode.HEAD_DIM
    out_offsets = tile_rows[:, None] * (H * mode.HEAD_DIM) + offs_d[None, :]
    stored = in_rows[:, None] & (offs_d < mode.HEAD_DIM)[None, :]
    tl.store(out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=stored)
    lse = (m_i + tl.log2(total)) / LOG2E
    tl.store(lse_ptr + (block.batch * H + block.head) * T + row + tile_rows, lse, mask=in_rows)


def launch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    key_counts: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = Layout(q, k, cu_seqlens, key_counts, mask, causal, scale, dropout_p, seed)
    rows = (layout.heads, layout.queries) if layout.varlen else (layout.batch, layout.heads, layout.queries)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    arch = architecture(q.device)
    tile = tiles.attention(layout.queries, layout.head_dim, q.element_size(), arch, dropout_p > 0.0)
    descriptors = None
    if (
        features.used("attention", arch, layout.batch * layout.queries)["DESCRIPTORS"] and dropout_p == 0.0
    ):  # on sm_100 registers spill with descriptors and dropout together
        block = [1, tile["BLOCK_N"], 1, tile["BLOCK_D"]]
        descriptors = make_descriptors(*((x[None] if layout.varlen else x, block) for x in (k, v)))
    k_view, v_view = descriptors or (heads_view(k), heads_view(v))
    launch(
        _attention_kernel,
        (layout.programs(tile["BLOCK_M"]),),
        q_view=heads_view(q),
        k_view=k_view,
        v_view=v_view,
        out_ptr=out,
        lse_ptr=lse,
        **layout.arguments,
        POSITIVE=scale > 0.0,
        DESCRIPTORS=descriptors is not None,
        **tile,
    )
    return out, lse
