"""Occupancy limits of the GPUs (resident warps per SM) and peaks for rooflines, from the vendors' manuals."""

from dataclasses import dataclass

__all__ = ["LIMITS", "ROOFLINES", "Limits", "Roofline", "resident_warps"]


@dataclass(frozen=True)
class Limits:
    """Limits of one SM (CU on gfx942, where a warp is a wavefront)."""

    warps: int
    blocks: int
    registers: int  # 32-bit registers of all threads
    register_unit: int  # allocation unit of registers per thread
    warp_size: int
    shared: int  # bytes for all blocks
    shared_reserved: int  # bytes of shared memory that the system reserves per block
    partitions: int = 4  # schedulers; a block's warps are spread over them


# Tables of compute capabilities (CUDA C++ programming guide) and of the CDNA 3 instruction set manual.
LIMITS = {
    "sm_80": Limits(64, 32, 65536, 8, 32, 164 << 10, 1 << 10),
    "sm_89": Limits(48, 24, 65536, 8, 32, 100 << 10, 1 << 10),
    "sm_90": Limits(64, 32, 65536, 8, 32, 228 << 10, 1 << 10),
    "sm_100": Limits(64, 32, 65536, 8, 32, 228 << 10, 1 << 10),
    "sm_120": Limits(48, 24, 65536, 8, 32, 100 << 10, 1 << 10),
    "gfx942": Limits(32, 16, 131072, 8, 64, 64 << 10, 0),
}


@dataclass(frozen=True)
class Roofline:
    """Dense 16-bit matrix arithmetic and memory of one accelerator, as published."""

    flop_s: float
    bytes_s: float

    def seconds(self, flops: float, bytes: float) -> float:
        """max(flops / peak, bytes / bandwidth).

        Example:
            >>> ROOFLINES["H100"].seconds(0.0, 3.35e12)
            1.0
        """
        return max(flops / self.flop_s, bytes / self.bytes_s)


ROOFLINES = {
    "A100": Roofline(312e12, 2.039e12),  # SXM, 80 GB
    "H100": Roofline(989e12, 3.35e12),  # SXM
    "MI300X": Roofline(1307e12, 5.3e12),
}


def resident_warps(arch: str, registers: int, shared: int, warps: int) -> int:
    """Warps of one kernel that fit on an SM; 0 when not even one block does.

    Args:
        arch: name in LIMITS.
        registers: of one thread.
        shared: bytes of one block.
        warps: of one block.
    Example:
        >>> resident_warps("sm_90", 128, 100 << 10, 4)   # two blocks, limited by shared memory
        8
    """
    limits = LIMITS[arch]
    per_thread = -(-max(registers, 1) // limits.register_unit) * limits.register_unit
    of_partition = limits.registers // limits.partitions // (per_thread * limits.warp_size)
    blocks = min(limits.blocks, limits.warps // warps, min(of_partition * limits.partitions, limits.warps) // warps)
    if shared:
        blocks = min(blocks, limits.shared // (shared + limits.shared_reserved))
    return blocks * warps
