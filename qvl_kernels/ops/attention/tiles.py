"""Tile choices of the attention kernels, forward and backward."""

from qvl_kernels.gpu.device import SHARED_MEMORY
from qvl_kernels.gpu.tiles import next_power_of_2

__all__ = ["attention", "attention_backward_keys", "attention_backward_queries"]


def _attention_stages(resident: int, stage: int, most: int, arch: str) -> int:
    """num_stages: how many stages of ``stage`` bytes fit in shared memory beside ``resident`` bytes; 1 on gfx942, which
    loads through registers.
    """
    return 1 if arch.startswith("gfx") else max(1, min(most, (SHARED_MEMORY[arch] - resident) // stage))


def attention(queries: int, head_dim: int, size: int, arch: str, dropout: bool = False) -> dict:
    """Forward: a block of queries is resident, keys and values stream. These are the largest tiles without register
    spills; random numbers of ``dropout`` need registers too.
    """
    block_d = max(16, next_power_of_2(head_dim))
    if size == 4:  # fp32 products keep their operands in registers
        block_m, block_n, warps = (16, 16, 4) if block_d > 64 else (32, 32, 8 if dropout else 4)
    elif block_d > 128:
        block_m, block_n, warps = 128 if arch in ("sm_90", "sm_100") else 64, 32, 8
    elif arch == "sm_90" and not dropout:  # measured on an H100
        block_m, block_n, warps = 128, 64 if block_d <= 64 else 128, 8
    else:
        block_m, block_n, warps = 128, 64, 4 if block_d <= 64 and arch not in ("sm_89", "sm_120") and not dropout else 8
    if dropout and arch.startswith("gfx"):
        block_n, warps = 16, 4
    block_m = min(block_m, max(16, next_power_of_2(queries)))
    most = 1 if dropout and arch == "sm_100" else 2 if dropout or size == 4 else 3
    stages = _attention_stages(block_m * block_d * size, 2 * block_n * block_d * size, most, arch)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


def attention_backward_queries(queries: int, head_dim: int, size: int, arch: str, dropout: bool = False) -> dict:
    """dq: a block of queries and their do are resident, keys and values stream."""
    block_d = max(16, next_power_of_2(head_dim))
    wide = arch in ("sm_90", "sm_100")  # WGMMA and tcgen05 read operands from shared memory
    if size == 4:
        block_m, block_n, warps = (16, 16, 4) if block_d > 128 else (32, 16, 4) if block_d > 64 else (32, 32, 4)
    elif block_d > 128:
        block_m, block_n, warps = 64, 32, 8
    elif arch.startswith("gfx"):
        block_m, block_n, warps = (64, 32, 4) if block_d > 64 else (64, 64, 4)
    elif arch == "sm_90" and block_d <= 64 and not dropout:  # measured on an H100, the third stage of others too
        block_m, block_n, warps = 64, 64, 4
    else:
        block_m, block_n, warps = 128, 64 if wide or block_d <= 64 else 32, 8
    if dropout and arch.startswith("gfx"):
        block_m, block_n, warps = 128, 16, 4
    block_m = min(block_m, max(16, next_power_of_2(queries)))
    most = 3 if arch == "sm_90" and size == 2 and block_d <= 128 and not dropout else 2
    stages = _attention_stages(2 * block_m * block_d * size, 2 * block_n * block_d * size, most, arch)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


def attention_backward_keys(keys: int, head_dim: int, size: int, arch: str, dropout: bool = False) -> dict:
    """dk and dv: a block of keys is resident, queries and do stream."""
    block_d = max(16, next_power_of_2(head_dim))
    wide = arch in ("sm_90", "sm_100")
    if size == 4:
        block_m, block_n, warps = (16, 16, 4) if block_d > 64 else (32, 32, 8 if dropout else 4)
    elif block_d > 128:
        block_m, block_n, warps = 32, 64, 8
    elif arch == "sm_90" and not dropout:  # measured on an H100
        block_m, block_n, warps = 32 if block_d > 64 else 64, 64, 4
    elif block_d > 64:  # two accumulators of 128 columns
        block_m, block_n, warps = (32, 128, 8) if wide else (32, 64, 8) if arch.startswith("gfx") else (64, 64, 8)
    else:
        block_m = 32 if dropout or arch in ("sm_89", "sm_120") else 64
        block_n, warps = 128, 4 if dropout and arch.startswith("gfx") else 8
    block_n = min(block_n, max(16, next_power_of_2(keys)))
    resident = 2 * block_n * block_d * size + (16 << 10)  # k, v, and scratch for converting a tile's layout
    most = 1 if size == 4 else 3 if arch == "sm_90" and block_d <= 128 and not dropout else 2
    stages = _attention_stages(resident, 2 * block_m * block_d * size, most, arch)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}
