"""int4 weights times many rows: nibbles become 16-bit weights in registers, on their way to the tensor cores."""

import torch
import triton
import triton.language as tl

from qvl_kernels import gpu, tuning
from qvl_kernels.triton_lib import launch

__all__ = ["launch_int4_matmul"]


@triton.jit
def _int4_matmul_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, W_COLUMNS, stride_x, stride_w, stride_scale, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF_GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """y = x dequantize(w)^T + bias, one group of inputs at a time: its low nibbles times their half of x, then its high ones.

    The weights are the left operand, which Hopper's tensor cores take from registers; the product is y transposed.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs = tl.arange(0, HALF_GROUP)
    x_offs = offs // 16 * 32 + offs % 16
    in_rows, in_n = rows < M, n < N
    x_base = x_ptr + rows.to(tl.int64)[:, None] * stride_x + x_offs[None, :]
    w_base = w_ptr + n.to(tl.int64)[:, None] * stride_w + offs[None, :]
    scale_base = scale_ptr + n.to(tl.int64) * stride_scale
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for column in range(0, W_COLUMNS, HALF_GROUP):
        k = column * 2 + x_offs
        low_x = tl.load(x_base + column * 2, mask=in_rows[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, HALF_GROUP]
        high_x = tl.load(x_base + column * 2 + 16, mask=in_rows[:, None] & (k + 16 < K)[None, :], other=0.0)
        w = tl.load(w_base + column, mask=in_n[:, None], other=0)  # [BLOCK_N, HALF_GROUP]
        scale = tl.load(scale_base + column // HALF_GROUP, mask=in_n, other=0.0).to(tl.float32)[:, None]
        low = (((w & 15).to(tl.float32) - 8.0) * scale).to(dtype)
        high = (((w >> 4).to(tl.float32) - 8.0) * scale).to(dtype)
        acc = tl.dot(low, tl.trans(low_x), acc)
        acc = tl.dot(high, tl.trans(high_x), acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    address = y_ptr + rows.to(tl.int64)[None, :] * stride_y + n[:, None]
    tl.store(address, acc.to(dtype), mask=in_rows[None, :] & in_n[:, None])


def launch_int4_matmul(
    rows: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """y [M, N] = 16-bit rows [M, K] times int4 values [N, K padded / 2] with scales [N, K padded / group]."""
    (m, k), (n, columns) = rows.shape, values.shape
    half_group = columns // scales.shape[1]
    tile = tuning.int4_matmul(m, half_group, gpu.architecture(rows.device))
    launch(
        _int4_matmul_kernel, (triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(n, tile["BLOCK_N"])),
        rows, values, scales, scales if bias is None else bias, y, m, n, k, columns, rows.stride(0), values.stride(0), scales.stride(0),
        y.stride(0), HALF_GROUP=half_group, HAS_BIAS=bias is not None, **tile,
    )  # fmt: skip
