"""A few rows times a weight on the FMA units: each thread loads 16 bytes of a weight row at a time and keeps its own sums.

Tiles are [BLOCKS, VECTOR]: BLOCKS loads of 16 bytes. A thread owns whole blocks, so that sums over VECTOR stay inside it and the
only exchange between threads is one reduction at the end. Rows of the weight are Python tuples, unrolled: BLOCK_N loads are in
flight together.
"""

import triton
import triton.language as tl

__all__ = ["gemv_fma_kernel"]


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
    if len(parts) == 1:
        return parts
    else:
        joined = ()
        for j in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[j], parts[j + len(parts) // 2]),)
        return joined


@triton.jit
def gemv_fma_kernel(
    x_ptr, w_ptr, scale_ptr, up_ptr, up_scale_ptr, bias_ptr, norm_ptr, residual_ptr, y_ptr,
    M, N, K, W_COLUMNS, eps, stride_x, stride_w, stride_scale, stride_up, stride_up_scale, stride_residual, stride_y,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, VECTOR: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    HAS_UP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    COUNT: tl.constexpr, ROW_COUNT: tl.constexpr,
):  # fmt: skip
    """y = norm(x) w^T + bias + residual, or silu(norm(x) w^T) * (norm(x) up^T); norm(x) = x / sqrt(mean(x^2) + eps) * weight.

    The factor of the norm is one number per row: it multiplies the finished sums, so x is read once. BITS is 8 or 4 for quantised
    weights, else 0. int4 with 16-bit x: x times nibble and 8 times the sum of x are added up apart, one subtraction per 32 inputs
    instead of 32; its cancellation costs two bits, so fp32 x takes the long way.
    """
    row0 = tl.program_id(1) * ROWS
    first = tl.program_id(0) * BLOCK_N
    block = tl.arange(0, BLOCKS)
    offs = block[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [BLOCKS, VECTOR], columns of w
    x_offs = offs
    if BITS == 4:
        x_offs = block[:, None] * 32 + tl.arange(0, VECTOR)[None, :]  # low nibbles; the high ones are 16 inputs further
    CENTRED: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    WEIGHT_ROWS: tl.constexpr = 2 * BLOCK_N if HAS_UP else BLOCK_N
    INPUTS: tl.constexpr = 2 * VECTOR if BITS == 4 else VECTOR  # of x per block
    zero = tl.zeros([BLOCKS], tl.float32)
    accs = ()
    for _ in tl.static_range(WEIGHT_ROWS * ROWS):
        accs = accs + (zero,)
    squares = ()
    for _ in tl.static_range(ROWS):
        squares = squares + (zero,)
    for column in range(0, W_COLUMNS, BLOCKS * VECTOR):
        mask = column + offs < W_COLUMNS
        weights = ()
        scales = ()
        for i in tl.static_range(WEIGHT_ROWS):
            n = tl.minimum(first + i % BLOCK_N, N - 1).to(tl.int64)
            base = w_ptr + n * stride_w
            if i >= BLOCK_N:
                base = up_ptr + n * stride_up
            weights = weights + (tl.load(base + column + offs, mask=mask, other=0, eviction_policy="evict_first"),)
            if BITS == 4:
                scale_row = scale_ptr + n * stride_scale
                if i >= BLOCK_N:
                    scale_row = up_scale_ptr + n * stride_up_scale
                inside = column + block * VECTOR < W_COLUMNS
                scale = tl.load(scale_row + (column // VECTOR + block) * 32 // GROUP, mask=inside, other=0.0)
                scales = scales + (scale.to(tl.float32),)
        k = column // VECTOR * INPUTS + x_offs
        if HAS_NORM:
            factor = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            if BITS == 4:
                factor_high = tl.load(norm_ptr + k + 16, mask=k + 16 < K, other=0.0).to(tl.float32)
        added = ()
        for r in tl.static_range(ROWS):
            row = tl.minimum(row0 + r, M - 1).to(tl.int64)
            x = tl.load(x_ptr + row * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
            square = squares[r]
            if HAS_NORM:
                square += tl.sum(x * x, 1)
                x = x * factor
            if BITS == 4:
                x_high = tl.load(x_ptr + row * stride_x + k + 16, mask=k + 16 < K, other=0.0).to(tl.float32)
                if HAS_NORM:
                    square += tl.sum(x_high * x_high, 1)
                    x_high = x_high * factor_high
                offset = tl.sum(x + x_high, 1) * 8.0
            added = added + (square,)
            updated = ()
            for i in tl.static_range(WEIGHT_ROWS):
                if BITS == 4:
                    low, high = (weights[i] & 15).to(tl.float32), (weights[i] >> 4).to(tl.float32)
                    if CENTRED:
                        product = tl.sum((low - 8.0) * x + (high - 8.0) * x_high, 1) * scales[i]
                    else:
                        product = (tl.sum(low * x + high * x_high, 1) - offset) * scales[i]
                else:
                    product = tl.sum(weights[i].to(tl.float32) * x, 1)
                updated = updated + (accs[r * WEIGHT_ROWS + i] + product,)
            accs = accs[: r * WEIGHT_ROWS] + updated + accs[(r + 1) * WEIGHT_ROWS :]
        squares = added

    index = tl.arange(0, COUNT)  # [COUNT], output i of row r at r * BLOCK_N + i
    r, n = index // BLOCK_N, first + index % BLOCK_N
    row = (row0 + r).to(tl.int64)
    valid = (r < ROWS) & (row < M) & (n < N)
    y = tl.sum(_stack(_padded(_picked(accs, 0, ROWS, BLOCK_N, WEIGHT_ROWS), zero, COUNT), COUNT), 0)
    if BITS == 8:
        y *= tl.load(scale_ptr + n * stride_scale, mask=valid, other=0.0)
    if HAS_NORM:
        mean = tl.sum(_stack(_padded(squares, zero, ROW_COUNT), ROW_COUNT), 0) / K  # [ROW_COUNT]
        mine = r[:, None] == tl.arange(0, ROW_COUNT)[None, :]
        factor = tl.sum(tl.where(mine, tl.rsqrt(mean + eps)[None, :], 0.0), 1)
        y *= factor
    if HAS_UP:
        up = tl.sum(_stack(_padded(_picked(accs, BLOCK_N, ROWS, BLOCK_N, WEIGHT_ROWS), zero, COUNT), COUNT), 0)
        if BITS == 8:
            up *= tl.load(up_scale_ptr + n * stride_up_scale, mask=valid, other=0.0)
        if HAS_NORM:
            up *= factor
        y = y * tl.sigmoid(y) * up
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=valid, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + row * stride_residual + n, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * stride_y + n, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _picked(accs, START: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHT_ROWS: tl.constexpr):
    """Of each row's WEIGHT_ROWS sums the BLOCK_N from START."""
    chosen = ()
    for r in tl.static_range(ROWS):
        for i in tl.static_range(BLOCK_N):
            chosen = chosen + (accs[r * WEIGHT_ROWS + START + i],)
    return chosen


@triton.jit
def _padded(parts, zero, COUNT: tl.constexpr):
    for _ in tl.static_range(COUNT - len(parts)):
        parts = parts + (zero,)
    return parts
