"""Kernel selection for quantised weights on GPUs, and the tiles of these kernels."""

from qvl_kernels.gpu.device import SHARED_MEMORY, SM_COUNT
from qvl_kernels.gpu.tiles import next_power_of_2
from qvl_kernels.ops.gemv.tiles import GEMV_ROWS

__all__ = ["int8_matmul", "quantize_rows", "quantized_linear_kernel"]


def quantized_linear_kernel(rows: int, bits: int) -> str:
    """The kernel for ``rows`` tokens: "gemv", "int8" or "dequantize" (once to x's dtype, then PyTorch's GEMM).

    Measured on an H100 with 17 to 4,096 tokens: int8 tensor cores are fastest for int8. There are no int4 ones; a GEMM
    that dequantises per tile of 128 tokens was up to 3.8 times slower than dequantising once, and 0.005 ms faster only
    below 64 tokens.
    """
    if rows <= GEMV_ROWS:
        return "gemv"
    return "int8" if bits == 8 else "dequantize"


def quantize_rows(k: int) -> dict:
    """A row of up to 8,192 elements in one pass: 16 elements per thread."""
    block = min(8192, next_power_of_2(k))
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 512))}


def int8_matmul(m: int, n: int, arch: str) -> dict:
    """int8 GEMM [m, k] x [n, k]: 128 bytes of k per step."""
    # There is a program for every SM first; tiles become 128 x 128 only with two waves of programs (measured on an
    # H100).
    block_m = 32 if m <= 32 else 64 if m * n < 2 * SM_COUNT[arch] * 128 * 128 else 128
    block_n = 128 if m * n >= SM_COUNT[arch] * block_m * 128 else 64
    stage = (block_m + block_n) * 128
    most = 3 if block_m * block_n == 128 * 128 else 4
    stages = 2 if arch.startswith("gfx") else max(2, min(most, (SHARED_MEMORY[arch] - 2048) // stage))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": 128,
        "num_warps": 8 if block_m * block_n >= 128 * 128 else 4,
        "num_stages": stages,
    }
