"""Kernel selection of quantised linear layers on the CPU: the extension, or PyTorch's linear on dequantised weights."""

import operator
from collections.abc import Callable

import torch

from qvl_kernels import tuning
from qvl_kernels.ops.linear.extension import extension_linear
from qvl_kernels.ops.linear.pytorch import pytorch_linear
from qvl_kernels.ops.linear.selection import LARGE_M
from qvl_kernels.quantization import QuantizedWeight, dequantize

__all__ = ["dequantized_linear", "quantized_linear_work"]

BLOCK_ROWS = 1024  # weight rows that are dequantised at once: avoids a dense copy of a large weight


def dequantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x dequantize(weight)^T + bias by PyTorch's linear. x is not rounded to int8."""
    outputs = weight.values.shape[0]
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    for begin in range(0, outputs, BLOCK_ROWS):
        rows = slice(begin, begin + BLOCK_ROWS)
        dense = dequantize(weight.apply(operator.itemgetter(rows)), x.dtype)
        y[..., rows] = pytorch_linear(x, dense, None if bias is None else bias[rows])
    return y


def quantized_linear_work(dtype: torch.dtype, n: int, k: int, bits: int, group: int, zero_points: bool) -> tuning.Work:
    """A quantised linear layer [n, k] over many tokens, for ``tuning.settle``."""
    groups = "" if bits == 8 else f", groups of {group}{' with zero-points' if zero_points else ''}"
    shape = f"{LARGE_M} x {k} to {n}{groups}"

    def calls(n: int) -> dict[str, Callable[[], object]]:
        padded = -(-k // group) * group
        x = torch.full((LARGE_M, k), 0.01, dtype=dtype)
        if bits == 8:
            values = torch.full((n, k), 1, dtype=torch.int8)
            scales = torch.full((n, 1), 0.01, dtype=torch.float32)
        else:
            values = torch.full((n, padded // 2), 0x99, dtype=torch.uint8)
            scales = torch.full((n, padded // group), 0.01, dtype=torch.bfloat16)
        zeros = torch.full((n, -(-padded // group // 2)), 0x88, dtype=torch.uint8) if zero_points else None
        weight = QuantizedWeight(values, scales, k, zeros)
        return {
            tuning.QVL: lambda: extension_linear(x, weight, None),
            tuning.PYTORCH: lambda: dequantized_linear(x, weight, None),
        }

    return tuning.Work(tuning.linear_kind(dtype, few=False, bits=bits), shape, n, calls)
