"""Dequantises weights to 16-bit or fp32 matrices for PyTorch's GEMM: pays off in prefill, over many tokens."""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu.launch import launch
from qvl_kernels.gpu.tiles import cdiv
from qvl_kernels.gpu.views import rows_view

__all__ = ["launch_dequantize"]

BLOCK = 1024  # bytes of values per program: 8 per thread


@triton.jit
def _dequantize_kernel(
    values_rows,
    scale_rows,
    zero_rows,
    weight_rows,
    K,
    W_COLUMNS,
    HALF_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight[n, k] = scale * value, or scale * (nibble - zero), zero = 8 without HAS_ZEROS; one program per row and
    block of stored bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_rows.ptr + row * values_rows.stride + offs, mask=offs < W_COLUMNS, other=0)  # [BLOCK]
    dtype = weight_rows.ptr.dtype.element_ty
    out = weight_rows.ptr + row * weight_rows.stride
    scale_ptr = scale_rows.ptr + row * scale_rows.stride
    if BITS == 8:
        scale = tl.load(scale_ptr)
        tl.store(out + offs, (values.to(tl.float32) * scale).to(dtype), mask=offs < K)
    else:
        group = offs // HALF_GROUP
        scale = tl.load(scale_ptr + group, mask=offs < W_COLUMNS, other=0.0).to(tl.float32)
        zero = 8.0
        if HAS_ZEROS:
            zero_ptr = zero_rows.ptr + row * zero_rows.stride
            pair = tl.load(zero_ptr + group // 2, mask=offs < W_COLUMNS, other=0).to(tl.int32)
            zero = ((pair >> (group % 2 * 4)) & 15).to(tl.float32)
        k = offs // 16 * 32 + offs % 16
        tl.store(out + k, (((values & 15).to(tl.float32) - zero) * scale).to(dtype), mask=k < K)
        tl.store(out + k + 16, (((values >> 4).to(tl.float32) - zero) * scale).to(dtype), mask=k + 16 < K)


def launch_dequantize(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, size: int, dtype: torch.dtype
) -> torch.Tensor:
    """The dense weight [N, size] in ``dtype``."""
    n, columns = values.shape
    weight = torch.empty((n, size), dtype=dtype, device=values.device)
    launch(
        _dequantize_kernel,
        (n, cdiv(columns, BLOCK)),
        values_rows=rows_view(values),
        scale_rows=rows_view(scales),
        zero_rows=rows_view(values if zeros is None else zeros),
        weight_rows=rows_view(weight),
        K=size,
        W_COLUMNS=columns,
        HALF_GROUP=columns // scales.shape[1],
        BITS=8 if values.dtype == torch.int8 else 4,
        HAS_ZEROS=zeros is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return weight
