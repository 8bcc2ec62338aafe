"""int8 GEMM for prefill on int8 tensor cores: rows of x are quantised to int8 too, with one scale each."""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu import features
from qvl_kernels.gpu.device import SM_COUNT, architecture
from qvl_kernels.gpu.device_functions import tile_pointers
from qvl_kernels.gpu.launch import launch, make_descriptors
from qvl_kernels.gpu.tiles import cdiv
from qvl_kernels.gpu.views import rows_view
from qvl_kernels.ops.quantized_linear import tiles as quantized_linear_tiles

__all__ = ["launch_int8_matmul", "launch_quantize_rows"]

ROUND = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: adding it to a small fp32 number rounds the number to an integer, ties to even


@triton.jit
def _quantize_rows_kernel(x_rows, values_rows, scale_ptr, K, BLOCK: tl.constexpr):
    """scale = max |x| / 127, values = round(x / scale); one program per row. A row with an element that is not finite
    gets the scale NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr, values_ptr = x_rows.ptr + row * x_rows.stride, values_rows.ptr + row * values_rows.stride
    offs = tl.arange(0, BLOCK)
    column_absmax = tl.zeros([BLOCK], tl.float32)
    not_finite = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, K, BLOCK):
        x = tl.load(x_ptr + begin + offs, mask=begin + offs < K, other=0.0).to(tl.float32)  # [BLOCK]
        column_absmax = tl.maximum(column_absmax, tl.abs(x))
        not_finite += x * 0.0
    absmax = tl.max(column_absmax, 0)
    inverse = tl.where(absmax > 1e-30, 127.0 / tl.maximum(absmax, 1e-30), 0.0)  # rows below 1e-30 become zeros
    for begin in range(0, K, BLOCK):
        mask = begin + offs < K
        x = tl.load(x_ptr + begin + offs, mask=mask, other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(x * inverse, -127.0), 127.0)
        tl.store(values_ptr + begin + offs, ((scaled + ROUND) - ROUND).to(tl.int8), mask=mask)
    tl.store(scale_ptr + row, absmax / 127.0 + tl.sum(not_finite, 0))


@triton.jit
def _int8_matmul_kernel(
    x_rows,
    x_scale_ptr,
    w_rows,
    w_scale_rows,
    bias_ptr,
    y_rows,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """y = (x w^T) * x_scale * w_scale + bias with int32 sums. Neighbouring programs share an N-block of w.

    DESCRIPTORS: x_rows and w_rows are TMA tensor descriptors, not views. PERSISTENT: the grid has fewer programs than
    tiles, and each program computes several.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * tl.cdiv(N, BLOCK_N)
    tiles_of_program = tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0)) if PERSISTENT else 1
    for index in tl.range(0, tiles_of_program, flatten=PERSISTENT, warp_specialize=WARP_SPECIALIZE):
        tile = tl.program_id(0) + index * tl.num_programs(0)
        first_row, first_n = tile % tiles_m * BLOCK_M, tile // tiles_m * BLOCK_N
        rows, n = first_row + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        in_rows, in_n = rows < M, n < N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for begin in range(0, K, BLOCK_K):
            if DESCRIPTORS:
                x = x_rows.load([first_row, begin])  # [BLOCK_M, BLOCK_K]
                w = w_rows.load([first_n, begin])  # [BLOCK_N, BLOCK_K]
            else:
                in_k = begin + offs_k < K
                x_tile = tile_pointers(x_rows, rows.to(tl.int64), offs_k)
                w_tile = tile_pointers(w_rows, n.to(tl.int64), offs_k)
                x = tl.load(x_tile + begin, mask=in_rows[:, None] & in_k[None, :], other=0)  # [BLOCK_M, BLOCK_K]
                w = tl.load(w_tile + begin, mask=in_n[:, None] & in_k[None, :], other=0)  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
        x_scale = tl.load(x_scale_ptr + rows, mask=in_rows, other=0.0)
        w_scale = tl.load(w_scale_rows.ptr + n.to(tl.int64) * w_scale_rows.stride, mask=in_n, other=0.0)
        y = acc.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        address = tile_pointers(y_rows, rows.to(tl.int64), n)
        tl.store(address, y.to(y_rows.ptr.dtype.element_ty), mask=in_rows[:, None] & in_n[None, :])


def launch_quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 values [M, K], fp32 scales [M]) of rows [M, K]."""
    m, k = rows.shape
    values = torch.empty((m, k), dtype=torch.int8, device=rows.device)
    scales = torch.empty((m,), dtype=torch.float32, device=rows.device)
    launch(
        _quantize_rows_kernel,
        (m,),
        x_rows=rows_view(rows),
        values_rows=rows_view(values),
        scale_ptr=scales,
        K=k,
        **quantized_linear_tiles.quantize_rows(k),
    )
    return values, scales


def launch_int8_matmul(
    rows: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """y [M, N] = rows [M, K] (values [N, K] * scales [N, 1])^T + bias, written to ``y``."""
    x, x_scales = launch_quantize_rows(rows)
    (m, k), n = rows.shape, values.shape[0]
    arch = architecture(rows.device)
    tile, flags = quantized_linear_tiles.int8_matmul(m, n, arch), features.used("int8_matmul", arch)
    descriptors = None
    if flags["DESCRIPTORS"]:
        descriptors = make_descriptors(
            (x, [tile["BLOCK_M"], tile["BLOCK_K"]]), (values, [tile["BLOCK_N"], tile["BLOCK_K"]])
        )
    flags["DESCRIPTORS"] = descriptors is not None
    x_rows, w_rows = descriptors or (rows_view(x), rows_view(values))
    programs = cdiv(m, tile["BLOCK_M"]) * cdiv(n, tile["BLOCK_N"])
    launch(
        _int8_matmul_kernel,
        (min(programs, SM_COUNT[arch]) if flags["PERSISTENT"] else programs,),
        x_rows=x_rows,
        x_scale_ptr=x_scales,
        w_rows=w_rows,
        w_scale_rows=rows_view(scales),
        bias_ptr=scales if bias is None else bias,
        y_rows=rows_view(y),
        M=m,
        N=n,
        K=k,
        HAS_BIAS=bias is not None,
        **flags,
        **tile,
    )
