"""Flash attention, forward: one program per block of queries and head, online softmax over blocks of keys.

The backward shares the device functions: tile scheduler, masks, tile loads and dropout.
"""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu import features
from qvl_kernels.gpu.device import architecture
from qvl_kernels.gpu.launch import launch, make_descriptors
from qvl_kernels.gpu.tiles import cdiv
from qvl_kernels.ops.attention import tiles
from qvl_kernels.ops.attention.layout import row_strides

__all__ = [
    "LENGTHS",
    "Layout",
    "block_coordinates",
    "dropout_keep_mask",
    "launch_attention",
    "load_tile",
    "masked_scores",
    "visible_keys",
    "zero_masked_keys",
]

LOG2E = tl.constexpr(1.4426950408889634)  # softmax to base 2
SEARCH = tl.constexpr(1024)  # sequences whose cu_seqlens a program reads at once
# Kernel arguments that change from call to call; specialising on them would recompile without faster code.
LENGTHS = ("T", "S", "sequences", "threshold", "scale")


@triton.jit
def block_coordinates(
    cu_seqlens_ptr,
    key_counts_ptr,
    sequences,
    T,
    S,
    heads,
    BLOCK: tl.constexpr,
    BY_KEYS: tl.constexpr,
    LAST_FIRST: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):
    """The tile scheduler: (batch, head, first row of the block, first row of its sequence, queries, keys).

    Programs run over blocks of queries (BY_KEYS: of keys), then heads, then the batch. cu_seqlens is clamped to [0, T],
    so that no value on the device leads outside the tensors. Rows after the last sequence count as one more sequence,
    which has no keys.
    """
    program = tl.program_id(0)
    if PACKED:
        blocks = T // BLOCK + sequences + 1
    else:
        blocks = tl.cdiv(S if BY_KEYS else T, BLOCK)
    block = program % blocks
    if LAST_FIRST:  # causal: the last queries see the most keys, so their programs start first
        block = blocks - 1 - block
    head, batch = (program // blocks) % heads, (program // blocks // heads).to(tl.int64)
    first, queries, keys = 0, T, S
    if PACKED:
        # Sequence i owns the blocks from cu_seqlens[i] // BLOCK + i on: enough for its rows, whatever other lengths.
        sequence = 0
        for begin in range(1, sequences + 1, SEARCH):
            i = begin + tl.arange(0, SEARCH)
            bounds = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + i, mask=i <= sequences, other=0), 0), T)
            sequence += tl.sum(((i <= sequences) & (bounds // BLOCK + i <= block)).to(tl.int32), 0)
        first = tl.load(cu_seqlens_ptr + sequence, mask=sequence > 0, other=0)
        end = tl.load(cu_seqlens_ptr + sequence + 1, mask=sequence < sequences, other=T)
        first = tl.minimum(tl.maximum(first, 0), T)
        end = tl.minimum(tl.maximum(end, first), T)
        block = tl.maximum(block - (first // BLOCK + sequence), 0)
        queries = end - first
        keys = tl.where(sequence < sequences, queries, 0)
    if HAS_COUNTS:
        keys = tl.minimum(tl.maximum(tl.load(key_counts_ptr + batch), 0), S).to(tl.int32)
    return batch, head, block * BLOCK, first, queries, keys


@triton.jit
def additive_mask_base2(mask):
    """The additive mask (attention bias) times log2(e).

    The lowest numbers of fp32 and bf16 are clamped to -2.35e38, so that they and the log-sum-exp stay finite: a row
    whose keys all carry them attends to all keys equally.
    """
    mask = mask.to(tl.float32)
    return tl.where(mask < -2.35e38, -2.35e38, mask) * LOG2E


@triton.jit
def visible_keys(mask_ptr, stride_ms, offs_n, keys, MASK: tl.constexpr, MASK_ROWS: tl.constexpr):
    """(visible, additive mask to base 2) of keys ``offs_n``, from the number of keys and a mask that is the same for
    all rows, [B, 1, 1, S].
    """
    visible, bias = offs_n < keys, tl.zeros(offs_n.shape, tl.float32)
    if MASK != 0 and not MASK_ROWS:
        mask = tl.load(mask_ptr + offs_n.to(tl.int64) * stride_ms, mask=visible, other=0)
        if MASK == 1:
            visible = visible & (mask != 0)
        else:
            visible = visible & (mask != float("-inf"))
            bias = additive_mask_base2(mask)
    return visible, bias


@triton.jit
def masked_scores(
    scores,
    rows,
    offs_n,
    visible,
    bias,
    mask_ptr,
    stride_mt,
    stride_ms,
    queries,
    keys,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """(scores + additive mask, visible) of a tile [queries, keys] or [keys, queries], to which ``rows``, ``offs_n`` and
    the results of ``visible_keys`` broadcast.
    """
    if CAUSAL:
        visible = visible & (offs_n <= rows + keys - queries)
    if MASK_ROWS:
        visible = visible & (rows < queries)
        mask = tl.load(
            mask_ptr + rows.to(tl.int64) * stride_mt + offs_n.to(tl.int64) * stride_ms, mask=visible, other=0
        )
        if MASK == 1:
            visible = visible & (mask != 0)
        else:
            visible = visible & (mask != float("-inf"))
            bias = additive_mask_base2(mask)
    if MASK == 2:
        scores += bias
    return scores, visible


@triton.jit
def load_tile(pointers, in_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTIAL: tl.constexpr):
    """[rows, BLOCK_D] with zeros beyond HEAD_DIM and, if PARTIAL, outside ``in_rows``."""
    in_d = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if HEAD_DIM == BLOCK_D:
        if PARTIAL:
            tile = tl.load(pointers, mask=in_rows[:, None], other=0.0)
        else:
            tile = tl.load(pointers)
    elif PARTIAL:
        tile = tl.load(pointers, mask=in_rows[:, None] & in_d, other=0.0)
    else:
        tile = tl.load(pointers, mask=in_d, other=0.0)
    return tile


@triton.jit
def load_tma_tile(descriptor, batch, row, head, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D] through a TMA tensor descriptor of [B, T, H, D] with blocks [1, ROWS, 1, BLOCK_D]; zeros outside
    the tensor.
    """
    return descriptor.load([batch.to(tl.int32), row, head, 0]).reshape([ROWS, BLOCK_D])


@triton.jit
def zero_masked_keys(x, visible):
    """x [keys, D] with 0 in the rows that no query of the tile [queries, keys] sees: masked keys may hold NaN, and
    0 * NaN is NaN.
    """
    seen = tl.max(visible.to(tl.int32), 0) > 0
    return tl.where(seen[:, None], x, 0.0)


@triton.jit
def dropout_keep_mask(seed, threshold, rows, offs_n, head):
    """The dropout keep mask of a tile. It depends on seed, row, key and head only, so forward and backward agree
    whatever their tiles; rows are numbered across the batch.

    Philox with 7 rounds passes the known tests of randomness (Salmon et al. 2011).
    """
    row = rows + offs_n * 0
    key = rows * 0 + offs_n
    bits = tl.philox(seed, key, row, row * 0 + head, row * 0, 7)[0]
    return (bits >> 1).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _attend(
    q,
    acc,
    l_i,
    m_i,
    begin,
    end,
    offs_m,
    k_ptr,
    v_ptr,
    mask_ptr,
    stride_ks,
    stride_vs,
    stride_mt,
    stride_ms,
    queries,
    keys,
    scale,
    seed,
    threshold,
    first_row,
    batch,
    first,
    head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    POSITIVE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """One pass of online softmax over keys [begin, end): m_i = row maximum, l_i = row sum, acc = p v.

    PARTIAL: some keys may be masked; else all rows see all of them.
    """
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_offsets = offs_n[:, None] * stride_ks + offs_d[None, :]
    v_offsets = offs_n[:, None] * stride_vs + offs_d[None, :]
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        wide_start, cols = start.to(tl.int64), start + offs_n
        key_visible, bias = visible_keys(mask_ptr, stride_ms, cols, keys, MASK if PARTIAL else 0, MASK_ROWS)
        if DESCRIPTORS:
            k = load_tma_tile(k_ptr, batch, first + start, head // GROUP, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            v = load_tma_tile(v_ptr, batch, first + start, head // GROUP, BLOCK_N, BLOCK_D)
            if PARTIAL:  # TMA also loads what follows the last key: another sequence, or NaN
                v = tl.where(key_visible[:, None], v, 0.0)
        else:
            k = load_tile(k_ptr + wide_start * stride_ks + k_offsets, key_visible, HEAD_DIM, BLOCK_D, PARTIAL)
            v = load_tile(v_ptr + wide_start * stride_vs + v_offsets, key_visible, HEAD_DIM, BLOCK_D, PARTIAL)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        # Where nothing is masked, a positive scale is folded into the subtraction of the row maximum.
        FOLDED: tl.constexpr = POSITIVE and not PARTIAL
        if not FOLDED:
            scores = scores * scale
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
            if MASK_ROWS:
                v = zero_masked_keys(v, visible)
            scores = tl.where(visible, scores, float("-inf"))
        largest = tl.max(scores, 1)
        m_new = tl.maximum(m_i, largest * scale if FOLDED else largest)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((scores * scale if FOLDED else scores) - m_safe[:, None])
        correction = tl.exp2(m_i - m_safe)
        l_i = l_i * correction + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(dropout_keep_mask(seed, threshold, (first_row + offs_m)[:, None], cols[None, :], head), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=LENGTHS)
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
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
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    POSITIVE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = softmax(q k^T scale + mask) v and the log-sum-exp of its rows, for BLOCK_M queries of one head.

    MASK: 0 none, 1 bool, 2 additive; MASK_ROWS: it differs between rows. ``scale`` includes log2(e). DESCRIPTORS: k_ptr
    and v_ptr are tensor descriptors of [B, S, Hkv, D].
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
    if not DESCRIPTORS:
        k_ptr += batch * stride_kb + (wide_head // GROUP) * stride_kh + wide_first * stride_ks
        v_ptr += batch * stride_vb + (wide_head // GROUP) * stride_vh + wide_first * stride_vs
    mask_ptr += batch * stride_mb + wide_head * stride_mh
    tile_rows = tl.arange(0, BLOCK_M)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    first_row = batch.to(tl.int32) * T + first
    q = load_tile(
        q_ptr + tile_rows[:, None] * stride_qt + offs_d[None, :], in_rows, HEAD_DIM, BLOCK_D, True
    )  # [BLOCK_M, BLOCK_D]

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    full, end = keys, keys  # all rows see keys before ``full``, no row sees keys from ``end`` on
    if CAUSAL:
        full = tl.minimum(keys, tl.maximum(start_m + 1 + keys - queries, 0))
        end = tl.minimum(keys, tl.maximum(start_m + BLOCK_M + keys - queries, 0))
    full = full // BLOCK_N * BLOCK_N
    if MASK == 0:
        acc, l_i, m_i = _attend(
            q,
            acc,
            l_i,
            m_i,
            0,
            full,
            offs_m,
            k_ptr,
            v_ptr,
            mask_ptr,
            stride_ks,
            stride_vs,
            stride_mt,
            stride_ms,
            queries,
            keys,
            scale,
            seed,
            threshold,
            first_row,
            batch,
            first,
            head,
            GROUP,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            CAUSAL,
            MASK,
            MASK_ROWS,
            DROPOUT,
            POSITIVE,
            DESCRIPTORS,
            False,
        )
    else:
        full = 0
    acc, l_i, m_i = _attend(
        q,
        acc,
        l_i,
        m_i,
        full,
        end,
        offs_m,
        k_ptr,
        v_ptr,
        mask_ptr,
        stride_ks,
        stride_vs,
        stride_mt,
        stride_ms,
        queries,
        keys,
        scale,
        seed,
        threshold,
        first_row,
        batch,
        first,
        head,
        GROUP,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        CAUSAL,
        MASK,
        MASK_ROWS,
        DROPOUT,
        POSITIVE,
        DESCRIPTORS,
        True,
    )

    total = tl.where(l_i == 0.0, 1.0, l_i)  # rows without keys give out 0, and lse -inf from m_i
    acc = acc * ((keep_scale if DROPOUT else 1.0) / total)[:, None]
    out_ptr += ((batch * T + wide_start) * H + head) * HEAD_DIM
    out_offsets = tile_rows[:, None] * (H * HEAD_DIM) + offs_d[None, :]
    tl.store(
        out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & (offs_d < HEAD_DIM)[None, :]
    )
    lse = (m_i + tl.log2(total)) / LOG2E
    tl.store(lse_ptr + (batch * H + head) * T + wide_start + tile_rows, lse, mask=in_rows)


class Layout:
    """Sizes, strides, mask and sequences of one call: the arguments that forward and backward kernels share."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        key_counts: torch.Tensor | None,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
        seed: torch.Tensor | None,
    ) -> None:
        self.varlen = cu_seqlens is not None
        self.batch = 1 if self.varlen else q.shape[0]
        self.queries, self.heads, self.head_dim = q.shape[-3:]
        self.keys, self.kv_heads = k.shape[-3], k.shape[-2]
        self.sequences = cu_seqlens.numel() - 1 if self.varlen else 0
        self.log2_scale = scale * LOG2E.value
        kind, full, mask_strides = 0, q, (0, 0, 0, 0)
        if mask is not None:
            kind = 1 if mask.dtype == torch.bool else 2
            full = (mask.view(torch.uint8) if kind == 1 else mask).expand(
                self.batch, self.heads, self.queries, self.keys
            )
            mask_strides = full.stride()
        self.tensors = (
            q if cu_seqlens is None else cu_seqlens.to(q.device, non_blocking=True),
            q if key_counts is None else key_counts,
            full,
            q if seed is None else seed,
        )
        self.mask_strides = mask_strides
        self.sizes = (
            self.queries,
            self.keys,
            self.heads,
            self.sequences,
            self.log2_scale,
            int(dropout_p * 2**31),
            1.0 / (1.0 - dropout_p),
        )
        self.flags = {
            "GROUP": self.heads // self.kv_heads,
            "HEAD_DIM": self.head_dim,
            "PACKED": self.varlen,
            "HAS_COUNTS": key_counts is not None,
            "CAUSAL": causal,
            "MASK": kind,
            "MASK_ROWS": mask is not None and mask.shape[1:3] != (1, 1),
            "DROPOUT": dropout_p > 0.0,
        }

    def programs(self, block: int, *, by_keys: bool = False) -> int:
        """The size of the grid. It depends on shapes only, not on the values of ``cu_seqlens``."""
        if self.varlen:
            blocks = self.queries // block + self.sequences + 1
        else:
            blocks = cdiv(self.keys if by_keys else self.queries, block)
        return blocks * (self.kv_heads if by_keys else self.heads) * self.batch


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
        features.variants("attention", arch, layout.batch * layout.queries)["DESCRIPTORS"] and dropout_p == 0.0
    ):  # on sm_100 registers spill with descriptors and dropout together
        block = [1, tile["BLOCK_N"], 1, tile["BLOCK_D"]]
        descriptors = make_descriptors(*((x[None] if layout.varlen else x, block) for x in (k, v)))
    launch(
        _attention_kernel,
        (layout.programs(tile["BLOCK_M"]),),
        q,
        *(descriptors or (k, v)),
        out,
        lse,
        *layout.tensors,
        *layout.sizes,
        *row_strides(q),
        *row_strides(k),
        *row_strides(v),
        *layout.mask_strides,
        POSITIVE=scale > 0.0,
        DESCRIPTORS=descriptors is not None,
        **layout.flags,
        **tile,
    )
    return out, lse
