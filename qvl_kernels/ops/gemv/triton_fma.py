"""GEMV of 1 to 4 tokens on the FMA units: a thread loads 16 bytes of a weight row at a time and keeps its own sums.

Tiles are [BLOCKS, VECTOR]: BLOCKS loads of 16 bytes. A thread owns whole blocks, so that sums over VECTOR stay in the
thread and one reduction at the end is the only exchange. The rows of the weight are a Python tuple, unrolled: BLOCK_N
loads are in flight together. PREFETCH: the next weights are loaded while the current ones are
multiplied, and with PDL the first loads do not wait for the kernel that writes x.
"""

import triton
import triton.language as tl

from qvl_kernels.gpu.device_functions import griddepcontrol_wait

__all__ = ["finish_rows", "_gemv_fma_kernel"]


@triton.jit
def _stack(parts, COUNT: tl.constexpr):
    """A tuple of COUNT (a power of two) tensors [BLOCKS] as one [BLOCKS, COUNT]."""
    if COUNT == 1:
        return parts[0][:, None]
    else:
        joined = ()
        for j in tl.static_range(COUNT // 2):
            joined = joined + (tl.join(parts[j], parts[j + COUNT // 2]),)
        for _ in tl.static_range(4):  # at most 16 parts; each pass halves them and adds a dimension of 2
            joined = _halve(joined)
        return tl.reshape(joined[0], (parts[0].shape[0], COUNT))


@triton.jit
def _halve(parts):
    """Joins pairs of tensors: half as many parts, each with one more dimension of 2."""
    if len(parts) == 1:
        return parts
    else:
        joined = ()
        for j in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[j], parts[j + len(parts) // 2]),)
        return joined


@triton.jit
def finish_rows(
    accs,
    squares,
    scale_rows,
    up_scale_rows,
    bias_ptr,
    residual_rows,
    y_rows,
    row0,
    first,
    M,
    N,
    K,
    eps,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BITS: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    COUNT: tl.constexpr,
    ROW_COUNT: tl.constexpr,
):
    """Reduces the threads' sums and stores y: the epilogue (scale, norm, SwiGLU, bias, residual).

    accs: per token BLOCK_N sums [BLOCKS] of w, then those of up; squares: one sum of x^2 [BLOCKS] per token.
    """
    WEIGHT_ROWS: tl.constexpr = 2 * BLOCK_N if HAS_UP else BLOCK_N
    zero = tl.zeros([accs[0].shape[0]], tl.float32)
    index = tl.arange(0, COUNT)  # [COUNT], output i of row r at r * BLOCK_N + i
    r, n = index // BLOCK_N, first + index % BLOCK_N
    row = (row0 + r).to(tl.int64)
    valid = (r < ROWS) & (row < M) & (n < N)
    y = tl.sum(_stack(_pad_parts(_pick_outputs(accs, 0, ROWS, BLOCK_N, WEIGHT_ROWS), zero, COUNT), COUNT), 0)
    if BITS == 8:
        y *= tl.load(scale_rows.ptr + n.to(tl.int64) * scale_rows.stride, mask=valid, other=0.0)
    if HAS_NORM:
        mean = tl.sum(_stack(_pad_parts(squares, zero, ROW_COUNT), ROW_COUNT), 0) / K  # [ROW_COUNT]
        mine = r[:, None] == tl.arange(0, ROW_COUNT)[None, :]
        factor = tl.sum(tl.where(mine, tl.rsqrt(mean + eps)[None, :], 0.0), 1)
        y *= factor
    if HAS_UP:
        up = tl.sum(_stack(_pad_parts(_pick_outputs(accs, BLOCK_N, ROWS, BLOCK_N, WEIGHT_ROWS), zero, COUNT), COUNT), 0)
        if BITS == 8:
            up *= tl.load(up_scale_rows.ptr + n.to(tl.int64) * up_scale_rows.stride, mask=valid, other=0.0)
        if HAS_NORM:
            up *= factor
        y = y * tl.sigmoid(y) * up
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=valid, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_rows.ptr + row * residual_rows.stride + n, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_rows.ptr + row * y_rows.stride + n, y.to(y_rows.ptr.dtype.element_ty), mask=valid)


@triton.jit
def _weights(w_rows, up_rows, first, k, N, K, BLOCK_N: tl.constexpr, WEIGHT_ROWS: tl.constexpr):
    """A tuple of [BLOCKS, VECTOR] tiles: columns k of BLOCK_N rows of w, then of up; 0 from column K on."""
    weights = ()
    for i in tl.static_range(WEIGHT_ROWS):
        n = tl.minimum(first + i % BLOCK_N, N - 1).to(tl.int64)
        base = w_rows.ptr + n * w_rows.stride
        if i >= BLOCK_N:
            base = up_rows.ptr + n * up_rows.stride
        weights = weights + (tl.load(base + k, mask=k < K, other=0, eviction_policy="evict_first"),)
    return weights


@triton.jit
def _gemv_fma_kernel(
    x_rows,
    w_rows,
    scale_rows,
    up_rows,
    up_scale_rows,
    bias_ptr,
    norm_ptr,
    residual_rows,
    y_rows,
    M,
    N,
    K,
    W_COLUMNS,
    eps,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    VECTOR: tl.constexpr,
    BITS: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    COUNT: tl.constexpr,
    ROW_COUNT: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = norm(x) w^T + bias + residual, or silu(norm(x) w^T) * (norm(x) up^T); norm(x) = x / sqrt(mean(x^2) + eps) *
    weight.

    1 / sqrt(mean(x^2) + eps) is one number per token and multiplies the finished sums, so x is read once. BITS is 8
    for int8 weights, whose scale per output multiplies the finished sums too, else 0.
    """
    row0 = tl.program_id(1) * ROWS
    first = tl.program_id(0) * BLOCK_N
    offs = tl.arange(0, BLOCKS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [BLOCKS, VECTOR]
    WEIGHT_ROWS: tl.constexpr = 2 * BLOCK_N if HAS_UP else BLOCK_N
    zero = tl.zeros([BLOCKS], tl.float32)
    accs = (zero,) * (WEIGHT_ROWS * ROWS)
    squares = (zero,) * ROWS
    if PREFETCH:
        prefetched = _weights(w_rows, up_rows, first, offs, N, K, BLOCK_N, WEIGHT_ROWS)
    griddepcontrol_wait(PDL)
    for column in range(0, K, BLOCKS * VECTOR):
        k = column + offs
        mask = k < K
        if PREFETCH:
            weights = prefetched
            prefetched = _weights(w_rows, up_rows, first, k + BLOCKS * VECTOR, N, K, BLOCK_N, WEIGHT_ROWS)
        else:
            weights = _weights(w_rows, up_rows, first, k, N, K, BLOCK_N, WEIGHT_ROWS)
        if HAS_NORM:
            factor = tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)  # [BLOCKS, VECTOR]
        new_squares = ()
        new_accs = ()
        for r in tl.static_range(ROWS):
            row = tl.minimum(row0 + r, M - 1).to(tl.int64)
            x = tl.load(x_rows.ptr + row * x_rows.stride + k, mask=mask, other=0.0).to(tl.float32)  # [BLOCKS, VECTOR]
            if HAS_NORM:
                new_squares = new_squares + (squares[r] + tl.sum(x * x, 1),)
                x = x * factor
            for i in tl.static_range(WEIGHT_ROWS):
                new_accs = new_accs + (accs[r * WEIGHT_ROWS + i] + tl.sum(weights[i].to(tl.float32) * x, 1),)
        accs = new_accs
        if HAS_NORM:
            squares = new_squares
    finish_rows(
        accs,
        squares,
        scale_rows,
        up_scale_rows,
        bias_ptr,
        residual_rows,
        y_rows,
        row0,
        first,
        M,
        N,
        K,
        eps,
        ROWS,
        BLOCK_N,
        BITS,
        HAS_UP,
        HAS_BIAS,
        HAS_NORM,
        HAS_RESIDUAL,
        COUNT,
        ROW_COUNT,
    )


@triton.jit
def _pick_outputs(accs, START: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHT_ROWS: tl.constexpr):
    """The sums START to START + BLOCK_N of each token's WEIGHT_ROWS sums."""
    chosen = ()
    for r in tl.static_range(ROWS):
        for i in tl.static_range(BLOCK_N):
            chosen = chosen + (accs[r * WEIGHT_ROWS + START + i],)
    return chosen


@triton.jit
def _pad_parts(parts, zero, COUNT: tl.constexpr):
    """``parts`` padded with ``zero`` to COUNT tensors."""
    for _ in tl.static_range(COUNT - len(parts)):
        parts = parts + (zero,)
    return parts
