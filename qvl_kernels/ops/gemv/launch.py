"""Launchers of the GEMV kernels: which kernel runs (FMA units or tensor cores), and with which tiles."""

from typing import Any

import torch

from qvl_kernels.gpu import features
from qvl_kernels.gpu.device import architecture
from qvl_kernels.gpu.launch import launch
from qvl_kernels.gpu.tiles import cdiv, elementwise, next_power_of_2
from qvl_kernels.gpu.views import RowsView, as_rows, rows_view
from qvl_kernels.ops.gemv import tiles
from qvl_kernels.ops.gemv.triton_dot import _gemv_dot_kernel, _normalise_rows_kernel
from qvl_kernels.ops.gemv.triton_fma import _gemv_fma_kernel
from qvl_kernels.ops.gemv.triton_int4 import _gemv_int4_kernel

__all__ = ["launch_gemv", "launch_gemv_swiglu", "launch_quantized_gemv", "launch_quantized_gemv_swiglu"]

_Weight = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def launch_gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return _gemv(x, (weight, None, None), None, bias, norm_weight, eps, residual)


def launch_gemv_swiglu(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, norm_weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return _gemv(x, (gate, None, None), (up, None, None), None, norm_weight, eps, None)


def launch_quantized_gemv(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return _gemv(x, (values, scales, zeros), None, bias, norm_weight, eps, residual)


def launch_quantized_gemv_swiglu(
    x: torch.Tensor,
    gate_values: torch.Tensor,
    gate_scales: torch.Tensor,
    gate_zeros: torch.Tensor | None,
    up_values: torch.Tensor,
    up_scales: torch.Tensor,
    up_zeros: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    gate, up = (gate_values, gate_scales, gate_zeros), (up_values, up_scales, up_zeros)
    return _gemv(x, gate, up, None, norm_weight, eps, None)


def _gemv(
    x: torch.Tensor,
    weight: _Weight,
    up: _Weight | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """``weight`` and ``up``, both with zero-points or neither, are (values, scales or None, zeros or None). Where a
    tensor is absent, the kernel gets another one, which it does not read.
    """
    values, scales, zeros = weight
    up_values, up_scales, up_zeros = weight if up is None else up
    if (zeros is None) != (up_zeros is None):
        raise ValueError("gemv: gate and up must both have zero-points, or neither")
    n, columns = values.shape
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    rows, y_rows = as_rows(x), as_rows(y)
    m, k = rows.shape[0] if x.shape[-1] else y_rows.shape[0], x.shape[-1]
    if m == 0 or n == 0:
        return y
    bits = {torch.int8: 8, torch.uint8: 4}.get(values.dtype, 0)
    group = 2 * columns // scales.shape[1] if scales is not None and bits == 4 else 0
    arch = architecture(x.device)
    residual_rows = rows if residual is None else as_rows(residual)
    tile = tiles.gemv_fma(m, n, k, x.element_size(), bits, up is not None, arch)
    flags = {"HAS_UP": up is not None, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    words: Any = None
    if tile is not None and bits == 4:
        words = _words(rows, norm_weight, values, up_values)
    if tile is None or (bits == 4 and words is None):
        tile = {**tiles.gemv_dot(x.element_size(), bits, group, up is not None, arch), "BITS": bits}
        kernel, programs = _gemv_dot_kernel, (cdiv(n, tile["BLOCK_N"]), cdiv(m, 16))
        if norm_weight is not None and x.dtype == torch.float16:
            # The kernel multiplies x * norm_weight before it divides by the root mean square: fp16 may overflow.
            rows, norm_weight = _normalised(rows, norm_weight, eps), None
    else:
        tile["COUNT"], tile["ROW_COUNT"] = (next_power_of_2(size * tile["ROWS"]) for size in (tile["BLOCK_N"], 1))
        kernel, programs = _gemv_fma_kernel, (cdiv(n, tile["BLOCK_N"]), cdiv(m, tile["ROWS"]))
        if bits == 4:
            rows, norm_weight, values, up_values = words
            k, columns = rows.shape[1], values.shape[1]
            kernel, tile["GROUP_BLOCKS"] = _gemv_int4_kernel, group // 32
        else:
            tile["VECTOR"], tile["BITS"] = 16 // values.element_size(), bits
    if kernel is not _gemv_fma_kernel:
        tile["HAS_ZEROS"] = zeros is not None
        for name, tensor in (("zero_rows", zeros), ("up_zero_rows", up_zeros)):
            tile[name] = rows_view(y_rows if tensor is None else tensor)
    if scales is None or up_scales is None:
        scales = up_scales = y_rows  # not read
    launch(
        kernel,
        programs,
        x_rows=RowsView(rows, rows.stride(0)),
        w_rows=RowsView(values, values.stride(0)),
        scale_rows=RowsView(scales, scales.stride(0)),
        up_rows=RowsView(up_values, up_values.stride(0)),
        up_scale_rows=RowsView(up_scales, up_scales.stride(0)),
        bias_ptr=x if bias is None else bias,
        norm_ptr=x if norm_weight is None else norm_weight,
        residual_rows=RowsView(residual_rows, residual_rows.stride(0)),
        y_rows=RowsView(y_rows, y_rows.stride(0)),
        M=m,
        N=n,
        K=k,
        W_COLUMNS=columns,
        eps=eps,
        HAS_NORM=norm_weight is not None,
        **features.used("decoding", arch),
        **flags,
        **tile,
    )
    return y


def _words(
    rows: torch.Tensor, norm_weight: torch.Tensor | None, *values: torch.Tensor
) -> tuple[torch.Tensor | None, ...] | None:
    """Views of x and the norm's weight as int64 and of int4 values as int32; None if alignment or strides forbid it."""
    if rows.element_size() != 2 or not all(_divisible(x, 4) for x in (rows, norm_weight, *values) if x is not None):
        return None
    norm_words = None if norm_weight is None else norm_weight.view(torch.int64)
    return rows.view(torch.int64), norm_words, *(x.view(torch.int32) for x in values)


def _divisible(x: torch.Tensor, by: int) -> bool:
    return all(size % by == 0 for size in (x.storage_offset(), x.shape[-1], *x.stride()[:-1]))


def _normalised(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    launch(
        _normalise_rows_kernel,
        (rows.shape[0],),
        x_rows=rows_view(rows),
        weight_ptr=weight,
        y_rows=rows_view(y),
        K=rows.shape[1],
        eps=eps,
        **features.used("decoding", architecture(rows.device)),
        **elementwise(rows.shape[1]),
    )
    return y
