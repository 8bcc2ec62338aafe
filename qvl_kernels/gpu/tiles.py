"""Tile choices that several ops share: pure functions of shapes, dtype and architecture, without autotuning.

Each function, here and in the ``tiles.py`` of the ops, returns the constexpr arguments and launch options (num_warps,
num_stages) of one kernel.
"""

__all__ = ["PARTIAL_SUMS", "cdiv", "elementwise", "next_power_of_2", "whole_rows"]

PARTIAL_SUMS = 256  # programs that each sum part of a weight's gradient: two per SM of large GPUs


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv costs the host 3 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def elementwise(size: int) -> dict:
    """Elementwise kernels over rows of ``size``: 8 elements per thread, which are 16-byte loads of 16-bit data."""
    block = min(2048, next_power_of_2(size))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def whole_rows(size: int) -> dict:
    """Rows of ``size`` elements held in registers: 16 to 32 elements per thread, several short rows per program."""
    block = next_power_of_2(size)
    rows = max(1, min(16, 2048 // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(2, rows * block // 512))}
