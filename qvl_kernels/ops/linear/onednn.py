"""Kernel selection: oneDNN (PyTorch's linear), which uses matrix units (AMX), for large M where it measures faster."""

import functools
import time
from collections.abc import Callable

import torch

from qvl_kernels.ops.linear.extension import extension_linear

__all__ = ["MIN_ROWS", "TILE_K", "onednn_is_faster", "use_onednn"]

MIN_ROWS = 16  # fewer tokens are bound by memory bandwidth, where the extension's GEMV is faster
TILE_K = 32  # bf16 elements in a row of an AMX tile


def use_onednn(x: torch.Tensor, rows: int, *weights: torch.Tensor) -> bool:
    """Whether linear layers with ``weights`` [N, K] over ``rows`` tokens of x's dtype run in oneDNN.

    K must be whole tiles: oneDNN (3.12, in torch 2.13) loads the last tile past the end of x's row and relies on zeros
    in the weight's tile. A NaN or infinity behind the row (the next row, or a gap) would make this row NaN too
    [oneDNN #5717].
    """
    whole_tiles = all(weight.shape[1] % TILE_K == 0 for weight in weights)
    return rows >= MIN_ROWS and x.dtype is torch.bfloat16 and whole_tiles and onednn_is_faster()


@functools.cache
def onednn_is_faster() -> bool:
    """Measured once per process with a prefill-sized GEMM, on CPUs with AMX only.

    Without matrix units oneDNN reached 0.9 to 1.0 (Zen 5) and 0.6 (AVX-512) times the extension's speed.
    """
    if not torch.cpu._is_amx_tile_supported():
        return False
    x, weight = torch.randn(256, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    return _best_time(lambda: torch.nn.functional.linear(x, weight)) < _best_time(
        lambda: extension_linear(x, weight, None)
    )


def _best_time(function: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])
