"""Every environment variable that qvl_kernels reads, in one place.

QVL_BACKEND       forces a backend ("reference", "cpp", "triton"); the same as ``use_backend`` around the whole program.
QVL_CPU_ISA       forces a CPU instruction set ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"); read
                  by the C++ extension.
QVL_CACHE         the folder of what is kept between processes; ~/.cache/qvl.
QVL_HUGE_PAGES    0: weights stay on the checkpoint's pages, which processes share; 1 or unset: they move to 2 MB pages.
QVL_TUNE          0: kernels are chosen by a static table; 1 or unset: by measuring, once per machine (see tuning.py).
TRITON_INTERPRET  1: Triton's own switch; its kernels then run on CPU tensors, slowly, for tests.
"""

import os
from pathlib import Path

__all__ = [
    "BACKEND_VARIABLE",
    "backend_from_environment",
    "cache_folder",
    "huge_pages_wanted",
    "interpreted",
    "tuning_wanted",
]

BACKEND_VARIABLE = "QVL_BACKEND"


def backend_from_environment() -> str | None:
    return os.environ.get(BACKEND_VARIABLE) or None


def cache_folder() -> Path:
    """$QVL_CACHE, or ~/.cache/qvl. Raises: RuntimeError if there is no home folder."""
    return Path(os.environ.get("QVL_CACHE") or Path.home() / ".cache" / "qvl")


def huge_pages_wanted() -> bool:
    """Whether QVL_HUGE_PAGES allows huge pages. Raises: ValueError unless it is 0 or 1."""
    value = os.environ.get("QVL_HUGE_PAGES") or "1"
    if value not in ("0", "1"):
        raise ValueError(
            f"QVL_HUGE_PAGES={value} means nothing; 0 leaves weights on the pages of the checkpoint, 1 (or unset) "
            f"moves them to 2 MB pages"
        )
    return value == "1"


def tuning_wanted() -> bool:
    """Whether QVL_TUNE allows measuring. Raises: ValueError unless it is 0 or 1."""
    value = os.environ.get("QVL_TUNE") or "1"
    if value not in ("0", "1"):
        raise ValueError(
            f"QVL_TUNE={value} means nothing; 0 chooses kernels by a static table, 1 (or unset) by measuring once"
        )
    return value == "1"


def interpreted() -> bool:
    """Whether Triton interprets its kernels in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"
