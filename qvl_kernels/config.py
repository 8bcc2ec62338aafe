"""Every environment variable that qvl_kernels reads, in one place.

QVL_BACKEND   forces a backend ("reference", "cpp", "triton"); the same as ``use_backend`` around the whole program.
QVL_CPU_ISA   forces a CPU instruction set ("portable", "avx2", "avx512", "avx512_bf16"); read by the C++ extension.
"""

import os

__all__ = ["BACKEND_VARIABLE", "backend_from_environment"]

BACKEND_VARIABLE = "QVL_BACKEND"


def backend_from_environment() -> str | None:
    return os.environ.get(BACKEND_VARIABLE) or None
