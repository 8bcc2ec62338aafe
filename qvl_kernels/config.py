"""Every environment variable that qvl_kernels reads, in one place.

QVL_BACKEND       forces a backend ("reference", "cpp", "triton"); the same as ``use_backend`` around the whole program.
QVL_CPU_ISA       forces a CPU instruction set ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"); read by the
                  C++ extension.
QVL_HUGE_PAGES    0: weights stay on the checkpoint's pages, which processes share; 1 or unset: they move to 2 MB pages.
TRITON_INTERPRET  1: Triton's own switch; its kernels then run on CPU tensors, slowly, for tests.
"""

import os

__all__ = ["BACKEND_VARIABLE", "backend_from_environment", "huge_pages_wanted", "interpreted"]

BACKEND_VARIABLE = "QVL_BACKEND"


def backend_from_environment() -> str | None:
    return os.environ.get(BACKEND_VARIABLE) or None


def huge_pages_wanted() -> bool:
    """Whether QVL_HUGE_PAGES allows huge pages. Raises: ValueError unless it is 0 or 1."""
    value = os.environ.get("QVL_HUGE_PAGES") or "1"
    if value not in ("0", "1"):
        raise ValueError(
            f"QVL_HUGE_PAGES={value} means nothing; 0 leaves weights on the pages of the checkpoint, 1 (or unset) "
            f"moves them to 2 MB pages"
        )
    return value == "1"


def interpreted() -> bool:
    """Whether Triton interprets its kernels in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"
