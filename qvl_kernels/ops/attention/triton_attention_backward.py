"""Flash attention, backward: a kernel over blocks of queries for dq, then one over blocks of keys for dk and dv.

Both recompute the scores. Each gradient is summed inside one program, over the query heads of a group too: no atomics,
so results are deterministic.
"""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu.device import architecture
from qvl_kernels.gpu.launch import launch
from qvl_kernels.ops.attention import tiles
from qvl_kernels.ops.attention.layout import row_strides
from qvl_kernels.ops.attention.triton_attention import (
    LENGTHS,
    LOG2E,
    Layout,
    block_coordinates,
    dropout_keep_mask,
    load_tile,
    masked_scores,
    visible_keys,
    zero_masked_keys,
)

__all__ = ["launch_attention_backward"]


@triton.jit
def _statistics(
    q,
    end,
    offs_m,
    k_ptr,
    mask_ptr,
    stride_ks,
    stride_mt,
    stride_ms,
    queries,
    keys,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """(row_max, log2 of row_sum = sum of 2^(score - row_max)) of each row; (inf, 0) where no key is seen."""
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_i, l_i = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, end, BLOCK_N):
        cols = start + offs_n
        key_visible, bias = visible_keys(mask_ptr, stride_ms, cols, keys, MASK, MASK_ROWS)
        k = load_tile(
            k_ptr + cols.to(tl.int64)[:, None] * stride_ks + offs_d[None, :], key_visible, HEAD_DIM, BLOCK_D, True
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores, visible = masked_scores(
            scores,
            offs_m[:, None],
            cols[None, :],
            key_visible[None, :],
            bias[None, :],
            mask_ptr,
            stride_mt,
            stride_ms,
            queries,
            keys,
            CAUSAL,
            MASK,
            MASK_ROWS,
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
    dq,
    row_sum,
    row_max,
    log_row_sum,
    delta,
    begin,
    end,
    offs_m,
    k_ptr,
    v_ptr,
    mask_ptr,
    dscores_ptr,
    stride_ks,
    stride_vs,
    stride_mt,
    stride_ms,
    queries,
    keys,
    S,
    scale,
    seed,
    threshold,
    keep_scale,
    first_row,
    head,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK_GRAD: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """dq += ds k over keys [begin, end), with ds = p (do v^T - delta).

    row_sum += the sum of p for fp32 inputs, else of p do v^T. PARTIAL as in the forward.
    """
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_offsets = offs_n[:, None] * stride_ks + offs_d[None, :]
    v_offsets = offs_n[:, None] * stride_vs + offs_d[None, :]
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        wide_start, cols = start.to(tl.int64), start + offs_n
        key_visible, bias = visible_keys(mask_ptr, stride_ms, cols, keys, MASK if PARTIAL else 0, MASK_ROWS)
        k = load_tile(
            k_ptr + wide_start * stride_ks + k_offsets, key_visible, HEAD_DIM, BLOCK_D, PARTIAL
        )  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptr + wide_start * stride_vs + v_offsets, key_visible, HEAD_DIM, BLOCK_D, PARTIAL)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if PARTIAL:
            scores, visible = masked_scores(
                scores,
                offs_m[:, None],
                cols[None, :],
                key_visible[None, :],
                bias[None, :],
                mask_ptr,
                stride_mt,
                stride_ms,
                queries,
                keys,
                CAUSAL,
                MASK,
                MASK_ROWS,
            )
            scores = tl.where(visible, scores, float("-inf"))
        scores -= row_max[:, None]
        if MASK == 2:
            scores -= log_row_sum[:, None]
        p = tl.exp2(scores)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            dp = tl.where(
                dropout_keep_mask(seed, threshold, (first_row + offs_m)[:, None], cols[None, :], head),
                dp * keep_scale,
                0.0,
            )
        if PARTIAL:
            dp = tl.where(visible, dp, 0.0)
        if q.dtype == tl.float32:
            row_sum += tl.sum(p, 1)
            ds = p * (dp - delta[:, None])
        else:
            product = p * dp
            row_sum += tl.sum(product, 1)
            ds = product - p * delta[:, None]
        if PARTIAL:
            if MASK_ROWS:
                k = zero_masked_keys(k, visible)
            if MASK_GRAD:
                in_tile = (offs_m < queries)[:, None] & (cols < S)[None, :]
                tl.store(dscores_ptr + offs_m.to(tl.int64)[:, None] * S + cols[None, :], ds, mask=in_tile)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq, row_sum


@triton.jit(do_not_specialize=LENGTHS)
def _attention_backward_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    lse_ptr,
    dlse_ptr,
    dq_ptr,
    row_max_ptr,
    log_row_sum_ptr,
    delta_ptr,
    dscores_ptr,
    cu_seqlens_ptr,
    key_counts_ptr,
    mask_ptr,
    seed_ptr,
    T,
    S,
    H,
    sequences,
    scale,
    threshold,
    keep_scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    stride_gb,
    stride_gt,
    stride_gh,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
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
    batch, head, start_m, first, queries, keys = block_coordinates(
        cu_seqlens_ptr, key_counts_ptr, sequences, T, S, H, BLOCK_M, False, CAUSAL, PACKED, HAS_COUNTS
    )
    if start_m >= queries:
        return
    offs_m, offs_d = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_rows = offs_m < queries
    wide_head, wide_first = head.to(tl.int64), first.to(tl.int64) if PACKED else 0
    wide_start = wide_first + start_m  # 64-bit base; offsets inside a tile are 32-bit
    q_ptr += batch * stride_qb + wide_head * stride_qh + wide_start * stride_qt
    k_ptr += batch * stride_kb + (wide_head // GROUP) * stride_kh + wide_first * stride_ks
    v_ptr += batch * stride_vb + (wide_head // GROUP) * stride_vh + wide_first * stride_vs
    do_ptr += batch * stride_gb + wide_head * stride_gh + wide_start * stride_gt
    out_start = ((batch * T + wide_start) * H + head) * HEAD_DIM
    mask_ptr += batch * stride_mb + wide_head * stride_mh
    dscores_ptr += (batch * H + head) * T * S
    seed = tl.load(seed_ptr) if DROPOUT else 0
    first_row = batch.to(tl.int32) * T + first
    tile_rows = tl.arange(0, BLOCK_M)
    q = load_tile(
        q_ptr + tile_rows[:, None] * stride_qt + offs_d[None, :], in_rows, HEAD_DIM, BLOCK_D, True
    )  # [BLOCK_M, BLOCK_D]
    do = load_tile(do_ptr + tile_rows[:, None] * stride_gt + offs_d[None, :], in_rows, HEAD_DIM, BLOCK_D, True)
    out_offsets = tile_rows[:, None] * (H * HEAD_DIM) + offs_d[None, :]
    out = load_tile(out_ptr + out_start + out_offsets, in_rows, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    stat_rows = (batch * H + head) * T + wide_start + tile_rows
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + stat_rows, mask=in_rows, other=0.0)
        delta -= dlse

    full, end = keys, keys
    if CAUSAL:
        full = tl.minimum(keys, tl.maximum(start_m + 1 + keys - queries, 0))
        end = tl.minimum(keys, tl.maximum(start_m + BLOCK_M + keys - queries, 0))
    full = full // BLOCK_N * BLOCK_N
    if MASK == 2:
        row_max, log_row_sum = _statistics(
            q,
            end,
            offs_m,
            k_ptr,
            mask_ptr,
            stride_ks,
            stride_mt,
            stride_ms,
            queries,
            keys,
            scale,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            CAUSAL,
            MASK,
            MASK_ROWS,
        )
    else:
        lse = tl.load(lse_ptr + stat_rows, mask=in_rows, other=0.0) * LOG2E
        row_max, log_row_sum = tl.where(lse == float("-inf"), float("inf"), lse), delta
    tl.store(row_max_ptr + stat_rows, row_max, mask=in_rows)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if MASK == 0:
        dq, row_sum = _dq_of_keys(
            q,
            do,
            dq,
            row_sum,
            row_max,
            log_row_sum,
            delta,
            0,
            full,
            offs_m,
            k_ptr,
            v_ptr,
            mask_ptr,
            dscores_ptr,
            stride_ks,
            stride_vs,
            stride_mt,
            stride_ms,
            queries,
            keys,
            S,
            scale,
            seed,
            threshold,
            keep_scale,
            first_row,
            head,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            CAUSAL,
            MASK,
            MASK_ROWS,
            DROPOUT,
            MASK_GRAD,
            False,
        )
    else:
        full = 0
    dq, row_sum = _dq_of_keys(
        q,
        do,
        dq,
        row_sum,
        row_max,
        log_row_sum,
        delta,
        full,
        end,
        offs_m,
        k_ptr,
        v_ptr,
        mask_ptr,
        dscores_ptr,
        stride_ks,
        stride_vs,
        stride_mt,
        stride_ms,
        queries,
        keys,
        S,
        scale,
        seed,
        threshold,
        keep_scale,
        first_row,
        head,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        CAUSAL,
        MASK,
        MASK_ROWS,
        DROPOUT,
        MASK_GRAD,
        True,
    )
    dq *= scale / LOG2E
    if q.dtype != tl.float32:
        delta = row_sum
        if HAS_DLSE:
            delta -= dlse
    elif MASK != 2:
        total = tl.where(row_sum == 0.0, 1.0, row_sum)
        dq, log_row_sum = dq / total[:, None], tl.log2(total)
    if MASK == 2 or q.dtype == tl.float32:
        tl.store(log_row_sum_ptr + stat_rows, log_row_sum, mask=in_rows)
    tl.store(delta_ptr + stat_rows, delta, mask=in_rows)
    tl.store(
        dq_ptr + out_start + out_offsets,
        dq.to(dq_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (offs_d < HEAD_DIM)[None, :],
    )


@triton.jit
def _dk_dv_of_queries(
    k,
    v,
    dk,
    dv,
    begin,
    end,
    offs_n,
    bias,
    q_ptr,
    do_ptr,
    row_max_ptr,
    log_row_sum_ptr,
    delta_ptr,
    mask_ptr,
    stride_qt,
    stride_qh,
    stride_gt,
    stride_gh,
    stride_mt,
    stride_mh,
    stride_ms,
    T,
    queries,
    keys,
    scale,
    seed,
    threshold,
    keep_scale,
    first_row,
    first_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """dk += ds^T q and dv += p^T do over blocks [begin, end) of queries, GROUP heads each. PARTIAL: some queries do not
    see all of these keys.

    Blocks and heads share one loop: two nested loops need more registers than there are.
    """
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_offsets = offs_m[:, None] * stride_qt + offs_d[None, :]
    do_offsets = offs_m[:, None] * stride_gt + offs_d[None, :]
    for step in range(begin * GROUP, end * GROUP):
        member, start = tl.cast(step % GROUP, tl.int64), tl.cast(step // GROUP, tl.int64) * BLOCK_M
        rows = step // GROUP * BLOCK_M + offs_m
        in_rows = rows < queries
        q = load_tile(
            q_ptr + member * stride_qh + start * stride_qt + q_offsets, in_rows, HEAD_DIM, BLOCK_D, True
        )  # [BLOCK_M, BLOCK_D]
        do = load_tile(do_ptr + member * stride_gh + start * stride_gt + do_offsets, in_rows, HEAD_DIM, BLOCK_D, True)
        stats = member * T + start
        row_max = tl.load(row_max_ptr + stats + offs_m, mask=in_rows, other=float("inf"))  # [BLOCK_M]
        delta = tl.load(delta_ptr + stats + offs_m, mask=in_rows, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # [BLOCK_N, BLOCK_M]
        if PARTIAL:
            scores, visible = masked_scores(
                scores,
                rows[None, :],
                offs_n[:, None],
                in_rows[None, :],
                bias[:, None],
                mask_ptr + member * stride_mh,
                stride_mt,
                stride_ms,
                queries,
                keys,
                CAUSAL,
                MASK,
                MASK_ROWS,
            )
            scores = tl.where(visible, scores, float("-inf"))
        elif MASK == 2:
            scores += bias[:, None]
        scores -= row_max[None, :]
        if MASK == 2 or q.dtype == tl.float32:
            scores -= tl.load(log_row_sum_ptr + stats + offs_m, mask=in_rows, other=0.0)[None, :]
        p = tl.exp2(scores)
        dp = tl.zeros([offs_n.shape[0], BLOCK_M], tl.float32)
        if not DROPOUT:  # the accumulator starts at -delta, which saves registers
            dp -= delta[None, :]
        dp = tl.dot(v, tl.trans(do), dp, input_precision="ieee")
        weights = p
        if DROPOUT:
            keep = dropout_keep_mask(
                seed, threshold, (first_row + rows)[None, :], offs_n[:, None], first_head + step % GROUP
            )
            weights, dp = tl.where(keep, p * keep_scale, 0.0), tl.where(keep, dp * keep_scale, 0.0) - delta[None, :]
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * dp
        if PARTIAL:
            ds = tl.where(visible, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def _attention_backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    row_max_ptr,
    log_row_sum_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    key_counts_ptr,
    mask_ptr,
    seed_ptr,
    T,
    S,
    H,
    sequences,
    scale,
    threshold,
    keep_scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    stride_gb,
    stride_gt,
    stride_gh,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk = scale sum of ds^T q, dv = sum of p^T do for BLOCK_N keys of one kv head, over queries of its GROUP heads."""
    batch, kv_head, start_n, first, queries, keys = block_coordinates(
        cu_seqlens_ptr, key_counts_ptr, sequences, T, S, H // GROUP, BLOCK_N, True, False, PACKED, HAS_COUNTS
    )
    rows_of_keys = queries if PACKED else S  # keys beyond a row's length get zeros
    if start_n >= rows_of_keys:
        return
    offs_n, offs_d = start_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    wide_head, wide_first = kv_head.to(tl.int64), first.to(tl.int64) if PACKED else 0
    wide_start = wide_first + start_n  # 64-bit base; offsets inside a tile are 32-bit
    k_ptr += batch * stride_kb + wide_head * stride_kh + wide_start * stride_ks
    v_ptr += batch * stride_vb + wide_head * stride_vh + wide_start * stride_vs
    tile_rows = tl.arange(0, BLOCK_N)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    first_row = batch.to(tl.int32) * T + first
    key_visible, bias = visible_keys(mask_ptr + batch * stride_mb, stride_ms, offs_n, keys, MASK, MASK_ROWS)
    k = load_tile(
        k_ptr + tile_rows[:, None] * stride_ks + offs_d[None, :], key_visible, HEAD_DIM, BLOCK_D, True
    )  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptr + tile_rows[:, None] * stride_vs + offs_d[None, :], key_visible, HEAD_DIM, BLOCK_D, True)

    # Blocks of queries before ``begin`` see none of these keys, those from ``full`` on see all of them.
    begin, full = 0, 0
    end = tl.where(start_n < keys, tl.cdiv(queries, BLOCK_M), 0)
    if CAUSAL:
        begin = tl.maximum(start_n - keys + queries, 0) // BLOCK_M
        full = tl.minimum(tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - keys + queries, 0), BLOCK_M), end)
    if MASK_ROWS:
        full = end
    first_head = kv_head * GROUP
    wide_head = first_head.to(tl.int64)
    stats = (batch * H + first_head) * T + wide_first
    q_ptr += batch * stride_qb + wide_head * stride_qh + wide_first * stride_qt
    do_ptr += batch * stride_gb + wide_head * stride_gh + wide_first * stride_gt
    mask_ptr += batch * stride_mb + wide_head * stride_mh
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if CAUSAL or MASK_ROWS:
        dk, dv = _dk_dv_of_queries(
            k,
            v,
            dk,
            dv,
            begin,
            full,
            offs_n,
            bias,
            q_ptr,
            do_ptr,
            row_max_ptr + stats,
            log_row_sum_ptr + stats,
            delta_ptr + stats,
            mask_ptr,
            stride_qt,
            stride_qh,
            stride_gt,
            stride_gh,
            stride_mt,
            stride_mh,
            stride_ms,
            T,
            queries,
            keys,
            scale,
            seed,
            threshold,
            keep_scale,
            first_row,
            first_head,
            GROUP,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_D,
            CAUSAL,
            MASK,
            MASK_ROWS,
            DROPOUT,
            True,
        )
    if not MASK_ROWS:
        dk, dv = _dk_dv_of_queries(
            k,
            v,
            dk,
            dv,
            full,
            end,
            offs_n,
            bias,
            q_ptr,
            do_ptr,
            row_max_ptr + stats,
            log_row_sum_ptr + stats,
            delta_ptr + stats,
            mask_ptr,
            stride_qt,
            stride_qh,
            stride_gt,
            stride_gh,
            stride_mt,
            stride_mh,
            stride_ms,
            T,
            queries,
            keys,
            scale,
            seed,
            threshold,
            keep_scale,
            first_row,
            first_head,
            GROUP,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_D,
            CAUSAL,
            MASK,
            MASK_ROWS,
            DROPOUT,
            False,
        )

    dk = tl.where(key_visible[:, None], dk * (scale / LOG2E), 0.0)
    dv = tl.where(key_visible[:, None], dv, 0.0)
    out_start = ((batch * S + wide_start) * (H // GROUP) + kv_head) * HEAD_DIM
    offsets = tile_rows[:, None] * (H // GROUP * HEAD_DIM) + offs_d[None, :]
    stored = (offs_n < rows_of_keys)[:, None] & (offs_d < HEAD_DIM)[None, :]
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
        if layout.flags["MASK"] == 2 or q.dtype == torch.float32
        else delta
    )
    dscores = delta
    if mask_grad:  # tiles that no program reaches stay 0
        shape = (layout.batch, layout.heads, layout.queries, layout.keys)
        dscores = torch.zeros(shape, dtype=torch.float32, device=q.device)
    strides = (*row_strides(q), *row_strides(k), *row_strides(v), *layout.mask_strides, *row_strides(grad))
    arch = architecture(q.device)
    tile = tiles.attention_backward_queries(layout.queries, layout.head_dim, q.element_size(), arch, dropout_p > 0.0)
    launch(
        _attention_backward_queries_kernel,
        (layout.programs(tile["BLOCK_M"]),),
        q,
        k,
        v,
        out,
        grad,
        lse,
        dlse,
        dq,
        row_max,
        log_row_sum,
        delta,
        dscores,
        *layout.tensors,
        *layout.sizes,
        *strides,
        HAS_DLSE=grad_lse is not None,
        MASK_GRAD=mask_grad,
        **layout.flags,
        **tile,
    )
    tile = tiles.attention_backward_keys(layout.keys, layout.head_dim, q.element_size(), arch, dropout_p > 0.0)
    launch(
        _attention_backward_keys_kernel,
        (layout.programs(tile["BLOCK_N"], by_keys=True),),
        q,
        k,
        v,
        grad,
        dk,
        dv,
        row_max,
        log_row_sum,
        delta,
        *layout.tensors,
        *layout.sizes,
        *strides,
        **layout.flags,
        **tile,
    )
    dmask = (
        dscores.sum_to_size(mask.shape).to(mask.dtype) if mask_grad else torch.empty(0, dtype=q.dtype, device=q.device)
    )
    return dq, dk, dv, dmask
