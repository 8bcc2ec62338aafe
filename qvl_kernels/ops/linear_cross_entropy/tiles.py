"""Tiles of the loss kernels, and how many rows and columns of logits are held at once."""

from qvl_kernels.gpu.tiles import next_power_of_2

__all__ = ["cross_entropy", "cross_entropy_columns", "cross_entropy_rows"]


def cross_entropy(vocabulary: int) -> dict:
    """Passes over a row of logits: 32 elements a thread, so that 4 loads of 16 bytes are in flight."""
    block = min(8192, next_power_of_2(vocabulary))
    return {"BLOCK": block, "num_warps": max(1, block // 1024)}


def cross_entropy_rows() -> int:
    """Rows of logits held at once where they need memory of their own: 311 MB of 16-bit logits with 151,936 words."""
    return 1024


def cross_entropy_columns(tokens: int, width: int, free: int) -> int:
    """How many columns of logits [tokens, V] come next where ``free`` rows of dweight [V, width] are neither written
    nor needed: as many as fit behind their own rows, a fifth of them with 8,192 tokens and 2,048 wide. 0 where these
    would be too few for a product.
    """
    columns = free * width // (tokens + width) // 64 * 64
    return columns if columns >= 1024 else 0
