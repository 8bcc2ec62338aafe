"""Tile choices of the Triton kernels: pure functions of shapes, dtype and architecture. No sweep at a user's first call.

Each function returns the constexpr arguments and launch options (num_warps, num_stages) of one kernel.
"""

__all__ = ["SHARED_MEMORY", "elementwise", "next_power_of_2", "row_in_registers"]

# Bytes of shared memory that one thread block may use.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def elementwise(size: int) -> dict:
    """Independent elements of rows of ``size``: 8 elements a thread, 16-byte loads of 16-bit data."""
    return {"BLOCK": min(1024, next_power_of_2(size)), "num_warps": 4}


def row_in_registers(size: int) -> dict:
    """A whole row of ``size`` elements in registers of one program: 16 elements a thread, more in rows beyond 8,192."""
    block = next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
