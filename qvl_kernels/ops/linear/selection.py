"""Kernel selection of linear layers on the CPU: the extension or PyTorch's linear."""

from collections.abc import Callable, Sequence

import torch

from qvl_kernels import tuning
from qvl_kernels.ops.linear.extension import extension_linear
from qvl_kernels.ops.linear.pytorch import pytorch_linear
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["MIN_ROWS", "linear_kinds", "linear_work", "use_pytorch"]

MIN_ROWS = 16  # fewer tokens are bound by memory bandwidth
LARGE_M = 256  # tokens measured for all prefills
FEW_BYTES = 64 << 20  # of weights that few tokens are measured on: more than most caches hold


def linear_kinds(dtype: torch.dtype, few: bool, weights: Sequence[torch.Tensor | QuantizedWeight]) -> frozenset[str]:
    """The kinds of work of linear layers with ``weights`` [N, K] that PyTorch's linear can do."""
    kinds = set()
    for weight in weights:
        if isinstance(weight, QuantizedWeight):
            k, bits = weight.in_features, weight.bits
        else:
            k, bits = weight.shape[1], None
        if k % tuning.TILE_K == 0 and not (few and bits):
            kinds.add(tuning.linear_kind(dtype, few, bits))
    return frozenset(kinds)


def use_pytorch(dtype: torch.dtype, rows: int, *weights: torch.Tensor | QuantizedWeight) -> bool:
    """Whether PyTorch's linear multiplies ``rows`` tokens of ``dtype`` with a weight [N, K], or with any of several."""
    return any(tuning.chosen(kind) == tuning.PYTORCH for kind in linear_kinds(dtype, rows < MIN_ROWS, weights))


def linear_work(dtype: torch.dtype, n: int, k: int, *, few: bool) -> tuning.Work:
    """A linear layer [n, k], for ``tuning.settle``: many tokens, or one and eight."""
    kind = tuning.linear_kind(dtype, few)
    if few:
        return tuning.Work(kind, f"1 and 8 x {k} to {n}", n, lambda size: _few_calls(dtype, size, k))
    return tuning.Work(kind, f"{LARGE_M} x {k} to {n}", n, lambda size: _many_calls(dtype, size, k))


def _many_calls(dtype: torch.dtype, n: int, k: int) -> dict[str, Callable[[], object]]:
    x, weight = (torch.full((rows, k), 0.01, dtype=dtype) for rows in (LARGE_M, n))
    return {
        tuning.QVL: lambda: extension_linear(x, weight, None),
        tuning.PYTORCH: lambda: pytorch_linear(x, weight, None),
    }


def _few_calls(dtype: torch.dtype, n: int, k: int) -> dict[str, Callable[[], object]]:
    """Each multiplication has other weights than the ones before it, since those of a model do not stay in the CPU
    caches between two tokens.
    """
    weights = torch.full((max(2 * n, FEW_BYTES // (k * dtype.itemsize)), k), 0.01, dtype=dtype)
    inputs = [torch.full((rows, k), 0.01, dtype=dtype) for rows in (1, 8)]
    begin = 0

    def run(linear: Callable[..., object]) -> None:
        nonlocal begin
        for x in inputs:
            begin = begin + n if begin + 2 * n <= len(weights) else 0
            linear(x, weights[begin : begin + n], None)

    return {tuning.QVL: lambda: run(extension_linear), tuning.PYTORCH: lambda: run(pytorch_linear)}
