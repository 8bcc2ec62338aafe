"""Tile choices of the RoPE kernels."""

from qvl_kernels.gpu.tiles import next_power_of_2

__all__ = ["rope"]


def rope(heads: int, kv_heads: int, half: int) -> dict:
    """Some heads of one token, with both halves of ``half`` elements in registers: 4 elements of each half per thread.

    A program has at most as many heads as k, so that grouped-query attention leaves no thread idle.
    """
    block = next_power_of_2(half)
    rows = min(next_power_of_2(min(heads, kv_heads)), max(1, 1024 // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(8, rows * block // 128))}
