"""Tile choices that several ops share: pure functions of shapes, dtype and architecture, with no sweep at a user's
first call.

Each function, here and in the ``tiles.py`` of the ops, returns the constexpr arguments and launch options (num_warps,
num_stages) of one kernel.
"""

__all__ = ["PARTIAL_SUMS", "cdiv", "elementwise", "next_power_of_2", "whole_rows"]

PARTIAL_SUMS = 256  # programs that each sum a part of a weight's gradient: two per multiprocessor of large GPUs


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes the host 3 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def elementwise(size: int) -> dict:
    """Independent elements of rows of ``size``: 8 elements a thread, 16-byte loads of 16-bit data."""
    block = min(2048, next_power_of_2(size))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def whole_rows(size: int) -> dict:
    """Rows of ``size`` elements that stay in registers: 16 to 32 elements a thread, several rows a program if they are
    short.
    """
    block = next_power_of_2(size)
    rows = max(1, min(16, 2048 // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(2, rows * block // 512))}
