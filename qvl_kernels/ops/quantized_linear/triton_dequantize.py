"""Dequantises weights to 16-bit or fp32 matrices for PyTorch's GEMM: pays off in prefill, over many tokens."""

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu.launch import launch
from qvl_kernels.gpu.tiles import cdiv

__all__ = ["launch_dequantize"]

BLOCK = 1024  # bytes of values per program: 8 per thread


@triton.jit
def _dequantize_kernel(
    values_ptr,
    scale_ptr,
    weight_ptr,
    K,
    W_COLUMNS,
    stride_values,
    stride_scale,
    stride_weight,
    HALF_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight[n, k] = scale * value, or scale * (nibble - 8); one program per row and block of stored bytes."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + row * stride_values + offs, mask=offs < W_COLUMNS, other=0)  # [BLOCK]
    dtype = weight_ptr.dtype.element_ty
    out = weight_ptr + row * stride_weight
    if BITS == 8:
        scale = tl.load(scale_ptr + row * stride_scale)
        tl.store(out + offs, (values.to(tl.float32) * scale).to(dtype), mask=offs < K)
    else:
        scale = tl.load(scale_ptr + row * stride_scale + offs // HALF_GROUP, mask=offs < W_COLUMNS, other=0.0).to(
            tl.float32
        )
        k = offs // 16 * 32 + offs % 16
        tl.store(out + k, (((values & 15).to(tl.float32) - 8.0) * scale).to(dtype), mask=k < K)
        tl.store(out + k + 16, (((values >> 4).to(tl.float32) - 8.0) * scale).to(dtype), mask=k + 16 < K)


def launch_dequantize(values: torch.Tensor, scales: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [N, size] in ``dtype``."""
    n, columns = values.shape
    weight = torch.empty((n, size), dtype=dtype, device=values.device)
    launch(
        _dequantize_kernel,
        (n, cdiv(columns, BLOCK)),
        values,
        scales,
        weight,
        size,
        columns,
        values.stride(0),
        scales.stride(0),
        weight.stride(0),
        HALF_GROUP=columns // scales.shape[1],
        BITS=8 if values.dtype == torch.int8 else 4,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return weight
