"""Device functions of the forward and backward attention kernels: tile scheduler, masks, tile loads, dropout."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from qvl_kernels.gpu.device_functions import LOG2E
from qvl_kernels.gpu.views import HeadsView, MaskView

__all__ = [
    "Block",
    "Dropout",
    "block_coordinates",
    "dropout_keep_mask",
    "head_mask",
    "head_view",
    "key_range",
    "load_tile",
    "load_tma_tile",
    "masked_scores",
    "visible_keys",
    "zero_masked_keys",
]

SEARCH = tl.constexpr(1024)  # sequences whose cu_seqlens a program reads at once


class Block(NamedTuple):
    """A program's block of queries (or keys): its first row is ``start`` in a sequence that begins at ``first``."""

    batch: Any
    head: Any
    start: Any
    first: Any
    queries: Any
    keys: Any


class Dropout(NamedTuple):
    """``first_row`` is the number of the sequence's first query, counted across the batch."""

    seed: Any
    threshold: Any
    keep_scale: Any
    first_row: Any


@triton.jit
def block_coordinates(
    cu_seqlens_ptr,
    key_counts_ptr,
    sequences,
    T,
    S,
    heads,
    mode: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_KEYS: tl.constexpr,
):
    """The tile scheduler: the program's Block.

    Programs run over blocks of queries (BY_KEYS: of keys), then heads, then the batch. cu_seqlens is clamped to [0, T],
    so that no value on the device leads outside the tensors. Rows after the last sequence count as one more sequence,
    which has no keys.
    """
    program = tl.program_id(0)
    if mode.VARLEN:
        blocks = T // BLOCK + sequences + 1
    else:
        blocks = tl.cdiv(S if BY_KEYS else T, BLOCK)
    block = program % blocks
    if mode.CAUSAL and not BY_KEYS:  # the last queries see the most keys, so their programs start first
        block = blocks - 1 - block
    head, batch = (program // blocks) % heads, (program // blocks // heads).to(tl.int64)
    first, queries, keys = 0, T, S
    if mode.VARLEN:
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
    if mode.HAS_COUNTS:
        keys = tl.minimum(tl.maximum(tl.load(key_counts_ptr + batch), 0), S).to(tl.int32)
    return Block(batch, head, block * BLOCK, first, queries, keys)


@triton.jit
def head_view(view, batch, head, row):
    """The HeadsView from row ``row`` of head ``head`` on."""
    ptr = view.ptr + (batch * view.stride_b + head * view.stride_h + row * view.stride_t)
    return HeadsView(ptr, view.stride_b, view.stride_t, view.stride_h)


@triton.jit
def head_mask(view, batch, head):
    """The MaskView from head ``head`` on."""
    ptr = view.ptr + (batch * view.stride_b + head * view.stride_h)
    return MaskView(ptr, view.stride_b, view.stride_h, view.stride_t, view.stride_s)


@triton.jit
def key_range(block, mode: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(full, end): all BLOCK_M queries see the keys before ``full``, none sees keys from ``end`` on."""
    full, end = block.keys, block.keys
    if mode.CAUSAL:
        full = tl.minimum(block.keys, tl.maximum(block.start + 1 + block.keys - block.queries, 0))
        end = tl.minimum(block.keys, tl.maximum(block.start + BLOCK_M + block.keys - block.queries, 0))
    full = full // BLOCK_N * BLOCK_N
    if mode.MASK != 0:
        full = 0
    return full, end


@triton.jit
def _additive_mask_base2(mask):
    """The additive mask (attention bias) times log2(e).

    The lowest numbers of fp32 and bf16 are clamped to -2.35e38, so that they and the log-sum-exp stay finite: a row
    whose keys all carry them attends to all keys equally.
    """
    mask = mask.to(tl.float32)
    return tl.where(mask < -2.35e38, -2.35e38, mask) * LOG2E


@triton.jit
def visible_keys(mask, offs_n, keys, mode: tl.constexpr):
    """(visible, additive mask to base 2) of keys ``offs_n``, from the number of keys and a mask that is the same for
    all rows, [B, 1, 1, S].
    """
    visible, bias = offs_n < keys, tl.zeros(offs_n.shape, tl.float32)
    if mode.MASK != 0 and not mode.MASK_ROWS:
        values = tl.load(mask.ptr + offs_n.to(tl.int64) * mask.stride_s, mask=visible, other=0)
        if mode.MASK == 1:
            visible = visible & (values != 0)
        else:
            visible = visible & (values != float("-inf"))
            bias = _additive_mask_base2(values)
    return visible, bias


@triton.jit
def masked_scores(scores, rows, offs_n, visible, bias, mask, block, mode: tl.constexpr):
    """(scores + additive mask, visible) of a tile [queries, keys] or [keys, queries], to which ``rows``, ``offs_n`` and
    the results of ``visible_keys`` broadcast.
    """
    if mode.CAUSAL:
        visible = visible & (offs_n <= rows + block.keys - block.queries)
    if mode.MASK_ROWS:
        visible = visible & (rows < block.queries)
        pointers = mask.ptr + rows.to(tl.int64) * mask.stride_t + offs_n.to(tl.int64) * mask.stride_s
        values = tl.load(pointers, mask=visible, other=0)
        if mode.MASK == 1:
            visible = visible & (values != 0)
        else:
            visible = visible & (values != float("-inf"))
            bias = _additive_mask_base2(values)
    if mode.MASK == 2:
        scores += bias
    return scores, visible


@triton.jit
def load_tile(pointers, in_rows, HEAD_DIM: tl.constexpr, PARTIAL: tl.constexpr):
    """[rows, BLOCK_D] with zeros beyond HEAD_DIM and, if PARTIAL, outside ``in_rows``."""
    BLOCK_D: tl.constexpr = pointers.shape[1]
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
def dropout_keep_mask(dropout, rows, offs_n, head):
    """The dropout keep mask of a tile. It depends on seed, row, key and head only, so forward and backward agree
    whatever their tiles; rows are numbered across the batch.

    Philox with 7 rounds passes the known tests of randomness (Salmon et al. 2011).
    """
    row = rows + offs_n * 0
    key = rows * 0 + offs_n
    bits = tl.philox(dropout.seed, key, row, row * 0 + head, row * 0, 7)[0]
    return (bits >> 1).to(tl.int32, bitcast=True) >= dropout.threshold
