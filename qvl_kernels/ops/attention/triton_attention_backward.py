"""Flash attention, backward: a kernel over blocks of queries for dq, then one over blocks of keys for dk and dv.

Both recompute the scores. Each gradient is summed inside one program, over the query heads of a group too: no atomics,
so results are deterministic.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu.device import architecture
from qvl_kernels.gpu.device_functions import LOG2E
from qvl_kernels.gpu.launch import launch
from qvl_kernels.gpu.views import RowsView, heads_view
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
    masked_scores,
    visible_keys,
    zero_masked_keys,
)

__all__ = ["launch_attention_backward"]


class Statistics(NamedTuple):
    """The softmax state of the rows [B, H, T] that the first kernel stores for the second."""

    row_max_ptr: Any
    log_row_sum_ptr: Any
    delta_ptr: Any


class RowState(NamedTuple):
    """The same of a block's rows, loaded."""

    row_max: Any
    log_row_sum: Any
    delta: Any


@triton.jit
def _statistics(q, end, k_view, mask, block, scale, mode: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row_max, log2 of row_sum = sum of 2^(score - row_max)) of each row; (inf, 0) where no key is seen."""
    BLOCK_M: tl.constexpr = q.shape[0]
    offs_m = block.start + tl.arange(0, BLOCK_M)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, q.shape[1])
    m_i, l_i = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, end, BLOCK_N):
        cols = start + offs_n
        key_visible, bias = visible_keys(mask, cols, block.keys, mode)
        k_pointers = k_view.ptr + cols.to(tl.int64)[:, None] * k_view.stride_t + offs_d[None, :]
        k = load_tile(k_pointers, key_visible, mode.HEAD_DIM, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores, visible = masked_scores(
            scores, offs_m[:, None], cols[None, :], key_visible[None, :], bias[None, :], mask, block, mode
        )
        scores = tl.where(visible, scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tl.exp2(scores - m_safe[:, None]), 1)
        m_i = m_new
    empty = m_i == float("-inf")
    return tl.where(empty, float("inf"), m_i), tl.log2(tl.where(empty, 1.0, l_i))


@triton.jit
def _dq_of_keys(
    q,
    do,
    sums,
    state,
    begin,
    end,
    k_view,
    v_view,
    mask,
    dscores,
    block,
    scale,
    dropout,
    mode: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_GRAD: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """``sums`` is (dq, row_sum): dq += ds k over keys [begin, end), with ds = p (do v^T - delta).

    row_sum += the sum of p for fp32 inputs, else of p do v^T. PARTIAL as in the forward.
    """
    dq, row_sum = sums
    offs_m = block.start + tl.arange(0, q.shape[0])
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, q.shape[1])
    k_offsets = offs_n[:, None] * k_view.stride_t + offs_d[None, :]
    v_offsets = offs_n[:, None] * v_view.stride_t + offs_d[None, :]
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        wide_start, cols = start.to(tl.int64), start + offs_n
        key_visible, bias = visible_keys(mask, cols, block.keys, mode)
        k_pointers = k_view.ptr + wide_start * k_view.stride_t + k_offsets
        v_pointers = v_view.ptr + wide_start * v_view.stride_t + v_offsets
        k = load_tile(k_pointers, key_visible, mode.HEAD_DIM, PARTIAL)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_pointers, key_visible, mode.HEAD_DIM, PARTIAL)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if PARTIAL:
            scores, visible = masked_scores(
                scores, offs_m[:, None], cols[None, :], key_visible[None, :], bias[None, :], mask, block, mode
            )
            scores = tl.where(visible, scores, float("-inf"))
        scores -= state.row_max[:, None]
        if mode.MASK == 2:
            scores -= state.log_row_sum[:, None]
        p = tl.exp2(scores)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if mode.DROPOUT:
            keep = dropout_keep_mask(dropout, (dropout.first_row + offs_m)[:, None], cols[None, :], block.head)
            dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
        if PARTIAL:
            dp = tl.where(visible, dp, 0.0)
        if q.dtype == tl.float32:
            row_sum += tl.sum(p, 1)
            ds = p * (dp - state.delta[:, None])
        else:
            product = p * dp
            row_sum += tl.sum(product, 1)
            ds = product - p * state.delta[:, None]
        if PARTIAL:
            if mode.MASK_ROWS:
                k = zero_masked_keys(k, visible)
            if MASK_GRAD:
                in_tile = (offs_m < block.queries)[:, None] & (cols < dscores.stride)[None, :]
                tl.store(dscores.ptr + offs_m.to(tl.int64)[:, None] * dscores.stride + cols[None, :], ds, mask=in_tile)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq, row_sum


@triton.jit(do_not_specialize=LENGTHS)
def _attention_backward_queries_kernel(
    q_view,
    k_view,
    v_view,
    out_ptr,
    do_view,
    lse_ptr,
    dlse_ptr,
    dq_ptr,
    statistics,
    dscores_ptr,
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
    HAS_DLSE: tl.constexpr,
    MASK_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq = scale sum of ds k for BLOCK_M queries, with ds = p (do v^T - delta), p = 2^(score - row_max - log_row_sum).

    Also stores the softmax state for the dk/dv kernel: row_max, log_row_sum and delta = rowsum(do out) - dlse.
    Rounding of the stored forward results would show with large scores, so they are corrected here: 16-bit inputs
    store delta as the sum of p do v^T; fp32 inputs store the lse in row_max, log2 of the sum of p in log_row_sum, and
    divide dq by that sum. With an additive mask as large as the dtype the lse cannot hold the logarithm of the sum, so
    both are recomputed.
    """
    block = block_coordinates(cu_seqlens_ptr, key_counts_ptr, sequences, T, S, H, mode, BLOCK_M, False)
    if block.start >= block.queries:
        return
    tile_rows, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    offs_m = block.start + tile_rows
    in_rows = offs_m < block.queries
    head, first = block.head.to(tl.int64), block.first.to(tl.int64) if mode.VARLEN else 0
    row = first + block.start.to(tl.int64)  # offsets inside a tile are 32-bit
    q_view, do_view = head_view(q_view, block.batch, head, row), head_view(do_view, block.batch, head, row)
    k_view = head_view(k_view, block.batch, head // mode.GROUP, first)
    v_view = head_view(v_view, block.batch, head // mode.GROUP, first)
    mask = head_mask(mask_view, block.batch, head)
    out_start = ((block.batch * T + row) * H + block.head) * mode.HEAD_DIM
    dscores = RowsView(dscores_ptr + (block.batch * H + block.head) * T * S, S)
    seed = tl.load(seed_ptr) if mode.DROPOUT else 0
    dropout = Dropout(seed, threshold, keep_scale, block.batch.to(tl.int32) * T + block.first)
    q_pointers = q_view.ptr + tile_rows[:, None] * q_view.stride_t + offs_d[None, :]
    do_pointers = do_view.ptr + tile_rows[:, None] * do_view.stride_t + offs_d[None, :]
    q = load_tile(q_pointers, in_rows, mode.HEAD_DIM, True)  # [BLOCK_M, BLOCK_D]
    do = load_tile(do_pointers, in_rows, mode.HEAD_DIM, True)
    out_offsets = tile_rows[:, None] * (H * mode.HEAD_DIM) + offs_d[None, :]
    out = load_tile(out_ptr + out_start + out_offsets, in_rows, mode.HEAD_DIM, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    stat_rows = (block.batch * H + block.head) * T + row + tile_rows
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + stat_rows, mask=in_rows, other=0.0)
        delta -= dlse

    full, end = key_range(block, mode, BLOCK_M, BLOCK_N)
    if mode.MASK == 2:
        row_max, log_row_sum = _statistics(q, end, k_view, mask, block, scale, mode, BLOCK_N)
    else:
        lse = tl.load(lse_ptr + stat_rows, mask=in_rows, other=0.0) * LOG2E
        row_max, log_row_sum = tl.where(lse == float("-inf"), float("inf"), lse), delta
    tl.store(statistics.row_max_ptr + stat_rows, row_max, mask=in_rows)

    state = RowState(row_max, log_row_sum, delta)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = (dq, tl.zeros([BLOCK_M], tl.float32))
    if mode.MASK == 0:
        sums = _dq_of_keys(
            q,
            do,
            sums,
            state,
            0,
            full,
            k_view,
            v_view,
            mask,
            dscores,
            block,
            scale,
            dropout,
            mode,
            BLOCK_N,
            MASK_GRAD,
            False,
        )
    sums = _dq_of_keys(
        q,
        do,
        sums,
        state,
        full,
        end,
        k_view,
        v_view,
        mask,
        dscores,
        block,
        scale,
        dropout,
        mode,
        BLOCK_N,
        MASK_GRAD,
        True,
    )
    dq, row_sum = sums
    dq *= scale / LOG2E
    if q.dtype != tl.float32:
        delta = row_sum
        if HAS_DLSE:
            delta -= dlse
    elif mode.MASK != 2:
        total = tl.where(row_sum == 0.0, 1.0, row_sum)
        dq, log_row_sum = dq / total[:, None], tl.log2(total)
    if mode.MASK == 2 or q.dtype == tl.float32:
        tl.store(statistics.log_row_sum_ptr + stat_rows, log_row_sum, mask=in_rows)
    tl.store(statistics.delta_ptr + stat_rows, delta, mask=in_rows)
    tl.store(
        dq_ptr + out_start + out_offsets,
        dq.to(dq_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (offs_d < mode.HEAD_DIM)[None, :],
    )


@triton.jit
def _dk_dv_of_queries(
    k,
    v,
    dk,
    dv,
    begin,
    end,
    bias,
    q_view,
    do_view,
    stats,
    mask,
    block,
    T,
    scale,
    dropout,
    mode: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """dk += ds^T q and dv += p^T do over blocks [begin, end) of queries, GROUP heads each. PARTIAL: some queries do not
    see all of these keys.

    Blocks and heads share one loop: two nested loops need more registers than there are.
    """
    offs_n = block.start + tl.arange(0, k.shape[0])
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, k.shape[1])
    q_offsets = offs_m[:, None] * q_view.stride_t + offs_d[None, :]
    do_offsets = offs_m[:, None] * do_view.stride_t + offs_d[None, :]
    for step in range(begin * mode.GROUP, end * mode.GROUP):
        member, start = tl.cast(step % mode.GROUP, tl.int64), tl.cast(step // mode.GROUP, tl.int64) * BLOCK_M
        rows = step // mode.GROUP * BLOCK_M + offs_m
        in_rows = rows < block.queries
        q_pointers = q_view.ptr + member * q_view.stride_h + start * q_view.stride_t + q_offsets
        do_pointers = do_view.ptr + member * do_view.stride_h + start * do_view.stride_t + do_offsets
        q = load_tile(q_pointers, in_rows, mode.HEAD_DIM, True)  # [BLOCK_M, BLOCK_D]
        do = load_tile(do_pointers, in_rows, mode.HEAD_DIM, True)
        first = member * T + start
        row_max = tl.load(stats.row_max_ptr + first + offs_m, mask=in_rows, other=float("inf"))  # [BLOCK_M]
        delta = tl.load(stats.delta_ptr + first + offs_m, mask=in_rows, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # [BLOCK_N, BLOCK_M]
        if PARTIAL:
            scores, visible = masked_scores(
                scores,
                rows[None, :],
                offs_n[:, None],
                in_rows[None, :],
                bias[:, None],
                head_mask(mask, 0, member),
                block,
                mode,
            )
            scores = tl.where(visible, scores, float("-inf"))
        elif mode.MASK == 2:
            scores += bias[:, None]
        scores -= row_max[None, :]
        if mode.MASK == 2 or q.dtype == tl.float32:
            scores -= tl.load(stats.log_row_sum_ptr + first + offs_m, mask=in_rows, other=0.0)[None, :]
        p = tl.exp2(scores)
        dp = tl.zeros([offs_n.shape[0], BLOCK_M], tl.float32)
        if not mode.DROPOUT:  # the accumulator starts at -delta, which saves registers
            dp -= delta[None, :]
        dp = tl.dot(v, tl.trans(do), dp, input_precision="ieee")
        weights = p
        if mode.DROPOUT:
            keep = dropout_keep_mask(
                dropout,
                (dropout.first_row + rows)[None, :],
                offs_n[:, None],
                block.head * mode.GROUP + step % mode.GROUP,
            )
            weights = tl.where(keep, p * dropout.keep_scale, 0.0)
            dp = tl.where(keep, dp * dropout.keep_scale, 0.0) - delta[None, :]
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * dp
        if PARTIAL:
            ds = tl.where(visible, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def _attention_backward_keys_kernel(
    q_view,
    k_view,
    v_view,
    do_view,
    dk_ptr,
    dv_ptr,
    statistics,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk = scale sum of ds^T q, dv = sum of p^T do for BLOCK_N keys of one kv head, over queries of its GROUP heads."""
    block = block_coordinates(cu_seqlens_ptr, key_counts_ptr, sequences, T, S, H // mode.GROUP, mode, BLOCK_N, True)
    queries, keys = block.queries, block.keys
    rows_of_keys = queries if mode.VARLEN else S  # keys beyond a row's length get zeros
    if block.start >= rows_of_keys:
        return
    tile_rows, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    offs_n = block.start + tile_rows
    first = block.first.to(tl.int64) if mode.VARLEN else 0
    row = first + block.start.to(tl.int64)  # offsets inside a tile are 32-bit
    k_view = head_view(k_view, block.batch, block.head.to(tl.int64), row)
    v_view = head_view(v_view, block.batch, block.head.to(tl.int64), row)
    seed = tl.load(seed_ptr) if mode.DROPOUT else 0
    dropout = Dropout(seed, threshold, keep_scale, block.batch.to(tl.int32) * T + block.first)
    first_head = block.head * mode.GROUP
    head = first_head.to(tl.int64)
    mask = head_mask(mask_view, block.batch, head)
    key_visible, bias = visible_keys(mask, offs_n, keys, mode)
    k_pointers = k_view.ptr + tile_rows[:, None] * k_view.stride_t + offs_d[None, :]
    v_pointers = v_view.ptr + tile_rows[:, None] * v_view.stride_t + offs_d[None, :]
    k = load_tile(k_pointers, key_visible, mode.HEAD_DIM, True)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_pointers, key_visible, mode.HEAD_DIM, True)

    # Blocks of queries before ``begin`` see none of these keys, those from ``full`` on see all of them.
    begin, full = 0, 0
    end = tl.where(block.start < keys, tl.cdiv(queries, BLOCK_M), 0)
    if mode.CAUSAL:
        begin = tl.maximum(block.start - keys + queries, 0) // BLOCK_M
        full = tl.minimum(tl.cdiv(tl.maximum(block.start + BLOCK_N - 1 - keys + queries, 0), BLOCK_M), end)
    if mode.MASK_ROWS:
        full = end
    stat_row = (block.batch * H + first_head) * T + first
    stats = Statistics(
        statistics.row_max_ptr + stat_row, statistics.log_row_sum_ptr + stat_row, statistics.delta_ptr + stat_row
    )
    q_view, do_view = head_view(q_view, block.batch, head, first), head_view(do_view, block.batch, head, first)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if mode.CAUSAL or mode.MASK_ROWS:
        dk, dv = _dk_dv_of_queries(
            k, v, dk, dv, begin, full, bias, q_view, do_view, stats, mask, block, T, scale, dropout, mode, BLOCK_M, True
        )
    if not mode.MASK_ROWS:
        dk, dv = _dk_dv_of_queries(
            k, v, dk, dv, full, end, bias, q_view, do_view, stats, mask, block, T, scale, dropout, mode, BLOCK_M, False
        )

    dk = tl.where(key_visible[:, None], dk * (scale / LOG2E), 0.0)
    dv = tl.where(key_visible[:, None], dv, 0.0)
    out_start = ((block.batch * S + row) * (H // mode.GROUP) + block.head) * mode.HEAD_DIM
    offsets = tile_rows[:, None] * (H // mode.GROUP * mode.HEAD_DIM) + offs_d[None, :]
    stored = (offs_n < rows_of_keys)[:, None] & (offs_d < mode.HEAD_DIM)[None, :]
    tl.store(dk_ptr + out_start + offsets, dk.to(dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptr + out_start + offsets, dv.to(dv_ptr.dtype.element_ty), mask=stored)


def launch_attention_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    key_counts: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    mask_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, gradient of the additive mask). The last, only with ``mask_grad``, is summed from ds
    [B, H, T, S], which then takes fp32 memory.
    """
    layout = Layout(q, k, cu_seqlens, key_counts, mask, causal, scale, dropout_p, seed)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dlse = lse if grad_lse is None else grad_lse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    row_max, delta = (torch.empty(lse.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    log_row_sum = (
        torch.empty(lse.shape, dtype=torch.float32, device=q.device)
        if layout.mode.MASK == 2 or q.dtype == torch.float32
        else delta
    )
    dscores = delta
    if mask_grad:  # tiles that no program reaches stay 0
        shape = (layout.batch, layout.heads, layout.queries, layout.keys)
        dscores = torch.zeros(shape, dtype=torch.float32, device=q.device)
    shared = {
        "q_view": heads_view(q),
        "k_view": heads_view(k),
        "v_view": heads_view(v),
        "do_view": heads_view(grad),
        "statistics": Statistics(row_max, log_row_sum, delta),
        **layout.arguments,
    }
    arch = architecture(q.device)
    tile = tiles.attention_backward_queries(layout.queries, layout.head_dim, q.element_size(), arch, dropout_p > 0.0)
    launch(
        _attention_backward_queries_kernel,
        (layout.programs(tile["BLOCK_M"]),),
        **shared,
        out_ptr=out,
        lse_ptr=lse,
        dlse_ptr=dlse,
        dq_ptr=dq,
        dscores_ptr=dscores,
        HAS_DLSE=grad_lse is not None,
        MASK_GRAD=mask_grad,
        **tile,
    )
    tile = tiles.attention_backward_keys(layout.keys, layout.head_dim, q.element_size(), arch, dropout_p > 0.0)
    launch(
        _attention_backward_keys_kernel,
        (layout.programs(tile["BLOCK_N"], by_keys=True),),
        **shared,
        dk_ptr=dk,
        dv_ptr=dv,
        **tile,
    )
    dmask = (
        dscores.sum_to_size(mask.shape).to(mask.dtype) if mask_grad else torch.empty(0, dtype=q.dtype, device=q.device)
    )
    return dq, dk, dv, dmask
