"""Tiles of the loss kernels, and how many rows and columns of logits are in memory at once."""

from qvl_kernels.gpu.tiles import next_power_of_2

__all__ = ["cross_entropy", "cross_entropy_columns", "cross_entropy_rows"]


def cross_entropy(vocabulary: int) -> dict:
    """Passes over a row of logits: 32 elements per thread, so that 4 loads of 16 bytes are in flight."""
    block = min(8192, next_power_of_2(vocabulary))
    return {"BLOCK": block, "num_warps": max(1, block // 1024)}


def cross_entropy_rows() -> int:
    """Rows of logits in a buffer of their own: 311 MB of 16-bit logits with a vocabulary of 151,936."""
    return 1024


def cross_entropy_columns(tokens: int, width: int, free: int) -> int:
    """Columns of logits [tokens, V] in the next block, if ``free`` rows of dweight [V, width] are still unused.

    The block's logits lie in the unused rows behind the rows of dweight that it produces: a fifth of ``free`` with
    8,192 tokens and width 2,048. 0 if the block would be too small for an efficient GEMM.
    """
    columns = free * width // (tokens + width) // 64 * 64
    return columns if columns >= 1024 else 0
