"""Tile choices of the GEMV kernels, and up to how many tokens they serve."""

import torch

from qvl_kernels.gpu.device import SHARED_MEMORY

__all__ = ["GEMV_ROWS", "is_small_m", "gemv_dot", "gemv_fma"]

GEMV_ROWS = 16  # up to 16 tokens a linear layer is bound by memory bandwidth; one tensor-core tile has 16 rows


def is_small_m(x: torch.Tensor) -> bool:
    """Whether x [..., K] has so few tokens that a linear layer on a GPU is a GEMV, bound by memory bandwidth."""
    return x.numel() <= GEMV_ROWS * x.shape[-1]


def gemv_fma(rows: int, n: int, k: int, size: int, bits: int, pair: bool, arch: str) -> dict | None:
    """GEMV of a weight [n, k] on the FMA units, or None where tensor cores are faster (``gemv_dot``).

    ``size``: bytes per element of x; ``bits``: 8 or 4 if quantised, else 0; ``pair``: gate and up weights.
    """
    # A tensor-core tile costs 16 rows for any number of tokens; FMA units pay per token. At 3.35 TB/s an H100 has 18
    # instruction slots per bf16 weight, 9 per int8 and 4.5 per int4 weight. Tensor cores do not reach fp32's accuracy.
    limit = {0: 4, 8: 3, 4: 1}[bits]
    if rows > limit and (size == 2 or bits == 4):
        return None
    per_block = {0: 16 // size, 8: 16, 4: 32}[bits]  # inputs in 16 bytes of a weight row
    lanes = 64 if arch.startswith("gfx") else 32
    # 16-bit weights take twice as many blocks, as their rows are long; several tokens take half, to save registers. Of
    # three sizes the one that covers k with the fewest idle lanes is taken.
    largest = 4 * lanes * (2 if bits == 0 and rows <= 2 else 1)
    blocks = min(
        (largest, largest // 2, largest // 4), key=lambda count: (-(-k // (per_block * count)) * count, -count)
    )
    # 8 loads of 16 bytes in flight per thread, and at least 512 programs (4 per SM of an H100) while n allows it.
    # Measured on an H100: fewer loads with software prefetch and more threads are faster, except for int4, whose pairs
    # want 16 loads.
    measured = arch == "sm_90"
    loads, each, most = {0: (2, 1, 8), 8: (4, 2, 4), 4: (8 * (2 if pair else 1), 1, 4)}[bits] if measured else (8, 1, 4)
    warps = max(1, min(most, blocks // each // lanes))
    together = max(1, loads * warps * lanes // blocks // (2 if pair else 1) // (1 if rows <= 2 else 2))
    block_n = next(b for b in (8, 4, 2, 1) if b == 1 or (b <= together and n >= 512 * b))
    tile = {"ROWS": min(rows, limit), "BLOCK_N": block_n, "BLOCKS": blocks, "num_warps": warps, "num_stages": 1}
    return tile if bits == 4 else {**tile, "PREFETCH": measured}


def gemv_dot(size: int, bits: int, group: int, pair: bool, arch: str) -> dict:
    """Small-M GEMM on tensor cores, up to 16 tokens in one tile of 16 rows. A program has 16 outputs, so that a layer
    of 1,024 outputs still fills half of the SMs.
    """
    block_n, parts = 16, 4
    # Columns of w per step: 64 to 128 bytes of a row, or one int4 group. Gate and up of 16 bits spill 16 bytes on
    # sm_120 with 64 columns.
    block = group // 2 if bits == 4 else 32 if bits == 0 and size == 2 and pair and arch == "sm_120" else 64
    stage = parts * block * (block_n * (2 if pair else 1) * (1 if bits else size) + 16 * size * (2 if bits == 4 else 1))
    # A third of shared memory, so that two or more programs run on an SM.
    stages = 2 if arch.startswith("gfx") else max(2, min(5, SHARED_MEMORY[arch] // 3 // stage))
    # fp32 products keep both operands in registers, so more warps share a slice of K.
    warps = parts * (1 if size == 2 else 2 if block <= 32 else 4)
    return {"BLOCK_N": block_n, "PARTS": parts, "BLOCK": block, "num_warps": warps, "num_stages": stages}
