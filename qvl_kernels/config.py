"""Every environment variable that qvl_kernels reads, in one place.

QVL_BACKEND       forces a backend ("reference", "cpp", "triton"); the same as ``use_backend`` around the whole program.
QVL_CPU_ISA       forces a CPU instruction set ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"); read by the C++ extension.
QVL_HUGE_PAGES    0: weights stay on the pages of the checkpoint, which processes share; by default they move to 2 MB pages.
TRITON_INTERPRET  1: Triton's own switch; its kernels then run on CPU tensors, slowly, for tests.
"""

import os

__all__ = ["BACKEND_VARIABLE", "backend_from_environment", "huge_pages_wanted", "interpreted"]

BACKEND_VARIABLE = "QVL_BACKEND"


def backend_from_environment() -> str | None:
    return os.environ.get(BACKEND_VARIABLE) or None


def huge_pages_wanted() -> bool:
    return os.environ.get("QVL_HUGE_PAGES") != "0"


def interpreted() -> bool:
    """Whether Triton interprets its kernels in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"
