"""Small-M (skinny) GEMM of 3 to 16 tokens on the tensor cores, whose smallest tile has 16 rows.

A program has BLOCK_N outputs and splits K into PARTS slices, one per warp, which are multiplied as a batch and summed
at the end: 1,024 outputs are only 64 programs, and one warp per program would not saturate the memory bandwidth.
"""

import triton
import triton.language as tl

from qvl_kernels.gpu.device_functions import griddepcontrol_wait

__all__ = ["_gemv_dot_kernel", "_normalise_rows_kernel"]


@triton.jit
def _group_zeros(zero_rows, n, group, mask):
    """The zero-points [PARTS, BLOCK_N, 1] of one group per part: groups 2 g and 2 g + 1 lie in byte g."""
    pair = tl.load(zero_rows.ptr + n[None, :] * zero_rows.stride + group // 2, mask=mask, other=0).to(tl.int32)
    return ((pair >> (group % 2 * 4)) & 15).to(tl.int8)[:, :, None]


@triton.jit
def _batched_dot(x, x_high, w, zero, BITS: tl.constexpr):
    """x w^T, batched over PARTS: [PARTS, 16, BLOCK] times [PARTS, BLOCK_N, BLOCK]^T.

    int4: low nibbles times x plus high nibbles times x_high, each minus ``zero``.
    """
    if BITS == 4:
        low, high = (w & 15).to(tl.int8) - zero, (w >> 4).to(tl.int8) - zero
        total = tl.dot(x, tl.trans(low.to(x.dtype), 0, 2, 1), input_precision="ieee")
        return tl.dot(x_high, tl.trans(high.to(x.dtype), 0, 2, 1), total, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(w.to(x.dtype), 0, 2, 1), input_precision="ieee")


@triton.jit
def _gemv_dot_kernel(
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
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = norm(x) w^T + bias + residual, or silu(norm(x) w^T) * (norm(x) up^T), as _gemv_fma_kernel.

    Each step takes PARTS * BLOCK columns of w. int4: BLOCK columns are one group, whose scale multiplies its product;
    its zero-point is 8 without HAS_ZEROS.
    """
    griddepcontrol_wait(PDL)
    rows = tl.program_id(1) * 16 + tl.arange(0, 16)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_rows, wide_n = rows.to(tl.int64), n.to(tl.int64)
    in_rows, in_n = rows < M, n < N
    part = tl.arange(0, PARTS)
    offs = (part[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])[:, None, :]  # [PARTS, 1, BLOCK]
    x_base = x_rows.ptr + wide_rows[None, :, None] * x_rows.stride
    w_base = w_rows.ptr + wide_n[None, :, None] * w_rows.stride
    up_base = up_rows.ptr + wide_n[None, :, None] * up_rows.stride
    acc = tl.zeros([PARTS, 16, BLOCK_N], tl.float32)
    up_acc = tl.zeros([PARTS, 16, BLOCK_N], tl.float32)
    squares = tl.zeros([PARTS, 16], tl.float32)
    for column in range(0, W_COLUMNS, PARTS * BLOCK):
        columns = column + offs
        w_mask = in_n[None, :, None] & (columns < W_COLUMNS)
        w = tl.load(w_base + columns, mask=w_mask, other=0)  # [PARTS, BLOCK_N, BLOCK]
        k = columns
        if BITS == 4:
            k = columns // 16 * 32 + columns % 16
        x = tl.load(x_base + k, mask=in_rows[None, :, None] & (k < K), other=0.0)  # [PARTS, 16, BLOCK]
        x_high = x
        if BITS == 4:
            x_high = tl.load(x_base + k + 16, mask=in_rows[None, :, None] & (k + 16 < K), other=0.0)
        if HAS_NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 2)
            x = (wide * tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)).to(x_rows.ptr.dtype.element_ty)
            if BITS == 4:
                wide = x_high.to(tl.float32)
                squares += tl.sum(wide * wide, 2)
                factor = tl.load(norm_ptr + k + 16, mask=k + 16 < K, other=0.0).to(tl.float32)
                x_high = (wide * factor).to(x_rows.ptr.dtype.element_ty)
        group = column // BLOCK + part[:, None]  # [PARTS, 1]
        scale_mask = in_n[None, :] & (group * BLOCK < W_COLUMNS)
        zero = 8
        if HAS_ZEROS:
            zero = _group_zeros(zero_rows, wide_n, group, scale_mask)
        product = _batched_dot(x, x_high, w, zero, BITS)
        if BITS == 4:
            scale = tl.load(scale_rows.ptr + wide_n[None, :] * scale_rows.stride + group, mask=scale_mask, other=0.0)
            product *= scale.to(tl.float32)[:, None, :]
        acc += product
        if HAS_UP:
            zero = 8
            if HAS_ZEROS:
                zero = _group_zeros(up_zero_rows, wide_n, group, scale_mask)
            product = _batched_dot(x, x_high, tl.load(up_base + columns, mask=w_mask, other=0), zero, BITS)
            if BITS == 4:
                scale = tl.load(
                    up_scale_rows.ptr + wide_n[None, :] * up_scale_rows.stride + group, mask=scale_mask, other=0.0
                )
                product *= scale.to(tl.float32)[:, None, :]
            up_acc += product

    y = tl.sum(acc, 0)  # [16, BLOCK_N]
    if BITS == 8:
        y *= tl.load(scale_rows.ptr + wide_n * scale_rows.stride, mask=in_n, other=0.0)[None, :]
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y *= factor[:, None]
    if HAS_UP:
        up = tl.sum(up_acc, 0)
        if BITS == 8:
            up *= tl.load(up_scale_rows.ptr + wide_n * up_scale_rows.stride, mask=in_n, other=0.0)[None, :]
        if HAS_NORM:
            up *= factor[:, None]
        y = y * tl.sigmoid(y) * up
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    mask = in_rows[:, None] & in_n[None, :]
    if HAS_RESIDUAL:
        residual = residual_rows.ptr + wide_rows[:, None] * residual_rows.stride + n[None, :]
        y += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_rows.ptr + wide_rows[:, None] * y_rows.stride + n[None, :], y.to(y_rows.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normalise_rows_kernel(x_rows, weight_ptr, y_rows, K, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y = x / sqrt(mean(x^2) + eps) * weight, one program per row."""
    griddepcontrol_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, K, BLOCK):
        x = tl.load(x_rows.ptr + row * x_rows.stride + begin + offs, mask=begin + offs < K, other=0.0).to(
            tl.float32
        )  # [BLOCK]
        squares += x * x
    factor = tl.rsqrt(tl.sum(squares) / K + eps)
    for begin in range(0, K, BLOCK):
        mask = begin + offs < K
        x = tl.load(x_rows.ptr + row * x_rows.stride + begin + offs, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + begin + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(
            y_rows.ptr + row * y_rows.stride + begin + offs,
            (x * factor * weight).to(y_rows.ptr.dtype.element_ty),
            mask=mask,
        )
