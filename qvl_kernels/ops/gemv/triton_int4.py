"""int4 GEMV of one or two 16-bit tokens on the FMA units, with three instructions per weight: mask, convert, FMA.

At an H100's memory bandwidth an SM gets 29 int4 weights a cycle and has 128 instruction slots. So nibbles are masked
in place in 32-bit words: nibble j is 16^j times too large, and x is divided by 16^j instead, once for all outputs of
the program. Zero-points are compensated with the sum of x, once per block.
"""

import triton
import triton.language as tl

from qvl_kernels.gpu.device_functions import griddepcontrol_wait
from qvl_kernels.ops.gemv.triton_fma import finish_rows

__all__ = ["_gemv_int4_kernel"]


@triton.jit
def _number(word, INDEX: tl.constexpr, dtype: tl.constexpr):
    """The 16-bit number INDEX of the four in a 64-bit word, as fp32."""
    return (word >> (16 * INDEX)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _gemv_int4_kernel(
    x_rows,
    w_rows,
    scale_rows,
    zero_rows,
    up_rows,
    up_scale_rows,
    up_zero_rows,
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
    GROUP_BLOCKS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    COUNT: tl.constexpr,
    ROW_COUNT: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = norm(x) w^T + bias + residual, or silu(norm(x) w^T) * (norm(x) up^T), with w = scale (nibble - zero).

    w is int32 [N, W_COLUMNS]; x and the norm's weight are K int64 words of four 16-bit numbers; y is of x's dtype. A
    block is 32 inputs in 4 words: byte i of word q holds inputs 4 q + i and 16 + 4 q + i. GROUP_BLOCKS blocks share a
    scale, and with HAS_ZEROS a zero-point, which is 8 otherwise: groups 2 g and 2 g + 1 in byte g.
    """
    griddepcontrol_wait(PDL)
    row0 = tl.program_id(1) * ROWS
    first = tl.program_id(0) * BLOCK_N
    dtype: tl.constexpr = y_rows.ptr.dtype.element_ty
    block = tl.arange(0, BLOCKS)
    q = tl.arange(0, 4)[None, :]
    WEIGHT_ROWS: tl.constexpr = 2 * BLOCK_N if HAS_UP else BLOCK_N
    zero = tl.zeros([BLOCKS], tl.float32)
    accs = (zero,) * (WEIGHT_ROWS * ROWS)
    squares = (zero,) * ROWS
    for column in range(0, W_COLUMNS, BLOCKS * 4):
        words = column + block[:, None] * 4 + q  # [BLOCKS, 4]
        inside = column + block * 4 < W_COLUMNS
        weights = ()
        scales = ()
        zeros = ()
        for i in tl.static_range(WEIGHT_ROWS):
            n = tl.minimum(first + i % BLOCK_N, N - 1).to(tl.int64)
            base, scale_base = w_rows.ptr + n * w_rows.stride, scale_rows.ptr + n * scale_rows.stride
            zero_base = zero_rows.ptr + n * zero_rows.stride
            if i >= BLOCK_N:
                base, scale_base = up_rows.ptr + n * up_rows.stride, up_scale_rows.ptr + n * up_scale_rows.stride
                zero_base = up_zero_rows.ptr + n * up_zero_rows.stride
            word = tl.load(base + words, mask=words < W_COLUMNS, other=0, eviction_policy="evict_first")  # [BLOCKS, 4]
            weights = weights + (word.to(tl.uint32, bitcast=True),)
            group = (column // 4 + block) // GROUP_BLOCKS  # [BLOCKS]
            scales = scales + (tl.load(scale_base + group, mask=inside, other=0.0).to(tl.float32),)
            if HAS_ZEROS:
                pair = tl.load(zero_base + group // 2, mask=inside, other=0).to(tl.int32)
                zeros = zeros + (((pair >> (group % 2 * 4)) & 15).to(tl.float32),)
            else:
                zeros = zeros + (8.0,)
        low = column * 2 + block[:, None] * 8 + q  # [BLOCKS, 4], in units of four inputs
        if HAS_NORM:
            low_norm = tl.load(norm_ptr + low, mask=low < K, other=0)  # [BLOCKS, 4]
            high_norm = tl.load(norm_ptr + low + 4, mask=low + 4 < K, other=0)
        new_squares = ()
        new_accs = ()
        for r in tl.static_range(ROWS):
            row = tl.minimum(row0 + r, M - 1).to(tl.int64)
            low_x = tl.load(x_rows.ptr + row * x_rows.stride + low, mask=low < K, other=0)  # [BLOCKS, 4]
            high_x = tl.load(x_rows.ptr + row * x_rows.stride + low + 4, mask=low + 4 < K, other=0)
            square = tl.zeros([BLOCKS, 4], tl.float32)
            x_sum = tl.zeros([BLOCKS, 4], tl.float32)
            parts = ()
            for i in tl.static_range(4):
                a, b = _number(low_x, i, dtype), _number(high_x, i, dtype)
                if HAS_NORM:
                    square += a * a + b * b
                    a, b = a * _number(low_norm, i, dtype), b * _number(high_norm, i, dtype)
                x_sum += a + b
                parts = parts + (a * (1.0 / (1 << (8 * i))), b * (1.0 / (1 << (8 * i + 4))))
            block_sum = tl.sum(x_sum, 1)  # [BLOCKS]
            if HAS_NORM:
                new_squares = new_squares + (squares[r] + tl.sum(square, 1),)
            for i in tl.static_range(WEIGHT_ROWS):
                product = tl.zeros([BLOCKS, 4], tl.float32)
                for j in tl.static_range(8):
                    product += (weights[i] & (15 << (4 * j))).to(tl.float32) * parts[j]
                sums = tl.sum(product, 1) - block_sum * zeros[i]
                new_accs = new_accs + (accs[r * WEIGHT_ROWS + i] + sums * scales[i],)
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
        K * 4,
        eps,
        ROWS,
        BLOCK_N,
        4,
        HAS_UP,
        HAS_BIAS,
        HAS_NORM,
        HAS_RESIDUAL,
        COUNT,
        ROW_COUNT,
    )
