"""Tile choices of the matrix-vector kernels, and up to how many rows they serve."""

import torch

from qvl_kernels.gpu.device import SHARED_MEMORY

__all__ = ["GEMV_ROWS", "few_rows", "gemv_dot", "gemv_fma"]

GEMV_ROWS = 16  # up to so many rows a linear layer is bound by reading its weight; one tile of the tensor cores has 16


def few_rows(x: torch.Tensor) -> bool:
    """Whether x [..., K] is bound by the weight on a GPU, and goes to the matrix-vector kernels."""
    return x.numel() <= GEMV_ROWS * x.shape[-1]


def gemv_fma(rows: int, n: int, k: int, size: int, bits: int, pair: bool, arch: str) -> dict | None:
    """Few rows times a weight [n, k] on the FMA units, or None where the tensor cores are better (``gemv_dot``).

    ``size``: bytes per element of x; ``bits``: 8 or 4 if quantised, else 0; ``pair``: gate and up weights.
    """
    # Tiles of the tensor cores have 16 rows whatever the number; on FMA units each row costs. At 3.35 TB/s an H100 has
    # 18 instruction slots per bf16 weight, 9 per int8 and 4.5 per int4 weight. fp32 has no tensor cores of its
    # accuracy.
    limit = {0: 4, 8: 3, 4: 1}[bits]
    if rows > limit and (size == 2 or bits == 4):
        return None
    per_block = {0: 16 // size, 8: 16, 4: 32}[bits]  # inputs in 16 bytes of a weight row
    lanes = 64 if arch.startswith("gfx") else 32
    # Twice as many of 16-bit weights, whose rows are long; half of it where more rows of x need registers. Of three
    # sizes the one that covers k with the fewest idle lanes.
    largest = 4 * lanes * (2 if bits == 0 and rows <= 2 else 1)
    blocks = min(
        (largest, largest // 2, largest // 4), key=lambda count: (-(-k // (per_block * count)) * count, -count)
    )
    # 8 loads of 16 bytes in flight per thread, and at least 512 programs (4 per processor of an H100) while n allows
    # it. Measured on an H100: fewer loads, the next ones under way, and more threads are better, but for int4, whose
    # pairs want 16.
    measured = arch == "sm_90"
    loads, each, most = {0: (2, 1, 8), 8: (4, 2, 4), 4: (8 * (2 if pair else 1), 1, 4)}[bits] if measured else (8, 1, 4)
    warps = max(1, min(most, blocks // each // lanes))
    together = max(1, loads * warps * lanes // blocks // (2 if pair else 1) // (1 if rows <= 2 else 2))
    block_n = next(b for b in (8, 4, 2, 1) if b == 1 or (b <= together and n >= 512 * b))
    tile = {"ROWS": min(rows, limit), "BLOCK_N": block_n, "BLOCKS": blocks, "num_warps": warps, "num_stages": 1}
    return tile if bits == 4 else {**tile, "AHEAD": measured}


def gemv_dot(size: int, bits: int, group: int, pair: bool, arch: str) -> dict:
    """Up to 16 rows times a weight in tiles of 16 rows: 16 outputs a program, so that a layer's 1,024 still fill half
    the chip.
    """
    block_n, parts = 16, 4
    # Columns of w, 64 to 128 bytes of a row; or those of one int4 group. Two 16-bit weights at once spill 16 bytes on
    # sm_120 with 64.
    block = group // 2 if bits == 4 else 32 if bits == 0 and size == 2 and pair and arch == "sm_120" else 64
    stage = parts * block * (block_n * (2 if pair else 1) * (1 if bits else size) + 16 * size * (2 if bits == 4 else 1))
    # A third of shared memory, so that two programs and more run on a processor.
    stages = 2 if arch.startswith("gfx") else max(2, min(5, SHARED_MEMORY[arch] // 3 // stage))
    # fp32 products keep both operands in registers: more warps share a slice.
    warps = parts * (1 if size == 2 else 2 if block <= 32 else 4)
    return {"BLOCK_N": block_n, "PARTS": parts, "BLOCK": block, "num_warps": warps, "num_stages": stages}
