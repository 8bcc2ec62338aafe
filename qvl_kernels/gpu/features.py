"""What kernels do beyond their plain form, on which architectures, and where that has been measured to be faster."""

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["DEFAULT", "DEFAULT_FROM", "SUPPORTED", "decoding", "override", "variants"]

# What kernels can do beyond their plain form, and where the audit finds that sound (Triton 3.9 and 3.6 fail to
# specialise the warps of attention).
# DESCRIPTORS: tiles are copied by tensor descriptors (TMA). PERSISTENT: one program a processor works through all
# tiles.
# WARP_SPECIALIZE: some warps copy while others multiply. DEPENDENT_LAUNCH: a kernel is launched while the one before it
# still runs, and waits for its results itself (programmatic dependent launch); "decoding" are the kernels of a decoding
# step.
SUPPORTED: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"DESCRIPTORS": ("sm_90", "sm_100")},
    "int8_matmul": {
        "DESCRIPTORS": ("sm_90", "sm_100"),
        "PERSISTENT": ("sm_90", "sm_100", "sm_120"),
        "WARP_SPECIALIZE": ("sm_100",),
    },
    "decoding": {"DEPENDENT_LAUNCH": ("sm_90", "sm_100", "sm_120")},
}

# (kernel, architecture) -> variants that a device has shown to be faster there than the plain form (make bench-gpu
# measures both).
DEFAULT: dict[tuple[str, str], tuple[str, ...]] = {
    ("attention", "sm_90"): ("DESCRIPTORS",),
    ("decoding", "sm_90"): ("DEPENDENT_LAUNCH",),
}

# Rows of a call from which on: a descriptor costs the host 5 us, more than it saves the device before.
DEFAULT_FROM = {"attention": 2048}

_tried: dict[str, tuple[str, ...]] = {}
_thread = threading.local()


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Inside the block kernels are steps of decoding: one after the other in this thread, over weights that none of
    them writes. That is what the variants of "decoding" need; elsewhere they are off.

    Example:
        >>> with features.decoding():
        ...     features.variants("decoding", "sm_90")
        {'DEPENDENT_LAUNCH': True}
    """
    before = getattr(_thread, "decoding", False)
    _thread.decoding = True
    try:
        yield
    finally:
        _thread.decoding = before


@contextlib.contextmanager
def override(kernel: str, *names: str) -> Iterator[None]:
    """Inside the block, ``kernel`` runs with these variants of SUPPORTED where its architecture has them, and no
    others.

    Example:
        >>> with features.override("attention", "DESCRIPTORS"):
        ...     features.variants("attention", "sm_90")
        {'DESCRIPTORS': True}
    """
    unknown = set(names) - set(SUPPORTED[kernel])
    if unknown:
        raise ValueError(f"{kernel} has no variants {sorted(unknown)}; choose from {sorted(SUPPORTED[kernel])}")
    previous = _tried.get(kernel)
    _tried[kernel] = names
    try:
        yield
    finally:
        del _tried[kernel]
        if previous is not None:
            _tried[kernel] = previous


def variants(kernel: str, arch: str, rows: int | None = None) -> dict[str, bool]:
    """Constexpr arguments: which of its variants ``kernel`` uses for so many rows (None: many)."""
    on = _tried.get(kernel)
    if on is None:
        enough = rows is None or rows >= DEFAULT_FROM.get(kernel, 0)
        on = (
            DEFAULT.get((kernel, arch), ())
            if enough and (kernel != "decoding" or getattr(_thread, "decoding", False))
            else ()
        )
    return {name: name in on and arch in where for name, where in SUPPORTED[kernel].items()}
