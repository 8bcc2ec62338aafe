"""Tile choices of the decode kernels: splits and blocks of keys."""

from qvl_kernels.gpu.device import SHARED_MEMORY, SM_COUNT
from qvl_kernels.gpu.tiles import next_power_of_2

__all__ = ["decode_attention"]


def decode_attention(
    heads: int, rows: int, head_dim: int, size: int, capacity: int | None, arch: str, int8: bool = False
) -> dict:
    """``heads``: kv heads of all sequences; ``rows``: queries times query heads per kv head; ``size``: bytes per
    element of q; ``int8``: an int8 KV cache.

    Four programs per SM hide memory latency and even out sequences of different lengths. There are at most 64 splits,
    each of one block of keys at least. The choice depends on ``capacity`` (None: it may grow), not on lengths, so the
    launch is the same at every step of a decode CUDA graph.
    """
    block_d = max(16, next_power_of_2(head_dim))
    largest = 16 if block_d > 128 or size == 4 or arch.startswith("gfx") else 64
    block_m = max(16, min(next_power_of_2(rows), largest))
    block_n = 16 if size == 4 or block_d > 256 else (64 if block_d <= 128 else 32)
    programs = heads * -(-rows // block_m)
    splits = next_power_of_2(-(-4 * SM_COUNT[arch] // max(1, programs)))
    splits = max(1, min(64, splits if capacity is None else min(splits, next_power_of_2(-(-capacity // block_n)))))
    stage = 2 * block_n * block_d * size
    # fp32 products keep operands in registers and spill with more stages; so does a third stage of an int8 cache,
    # which loads scales too, on sm_100.
    most = 2 if int8 else 3
    stages = 1 if arch.startswith("gfx") or size == 4 else max(1, min(most, SHARED_MEMORY[arch] // 2 // stage))
    joined = 512 if arch == "sm_89" else 2048  # elements of partial results per step; sm_89 spills with more
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "SPLITS": splits,
        "COMBINE_STEP": min(splits, max(1, joined // block_d)),
        "num_warps": 4,
        "num_stages": stages,
    }
