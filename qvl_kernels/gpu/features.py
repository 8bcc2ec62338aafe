"""Kernel features (TMA, persistent kernels, warp specialisation, PDL): where supported, and where on by default."""

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["DEFAULT", "DEFAULT_FROM", "SUPPORTED", "decoding", "override", "used"]

# kernel -> features -> architectures on which the compile check passes with them (Triton 3.9 and 3.6 fail to specialise
# the warps of attention). "decoding" stands for the kernels of a decode step.
# DESCRIPTORS: tiles are loaded through TMA tensor descriptors. PERSISTENT: one program per SM loops over all tiles.
# WARP_SPECIALIZE: some warps load while others multiply. PDL (programmatic dependent launch): a kernel starts while
# the previous one still runs, and waits for its results (griddepcontrol.wait).
SUPPORTED: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"DESCRIPTORS": ("sm_90", "sm_100")},
    "int8_matmul": {
        "DESCRIPTORS": ("sm_90", "sm_100"),
        "PERSISTENT": ("sm_90", "sm_100", "sm_120"),
        "WARP_SPECIALIZE": ("sm_100",),
    },
    "decoding": {"PDL": ("sm_90", "sm_100", "sm_120")},
}

# (kernel, architecture) -> features that were measured to be faster than without them (make bench-gpu measures both).
DEFAULT: dict[tuple[str, str], tuple[str, ...]] = {
    ("attention", "sm_90"): ("DESCRIPTORS",),
    ("decoding", "sm_90"): ("PDL",),
}

# kernel -> tokens from which its features are on: a descriptor costs the host 5 us, more than it saves short calls.
DEFAULT_FROM = {"attention": 2048}

_tried: dict[str, tuple[str, ...]] = {}
_thread = threading.local()


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Turns on the features of "decoding" inside the block: its kernels run one after the other in this thread, and
    none writes the weights, as PDL requires.

    Example:
        >>> with features.decoding():
        ...     features.used("decoding", "sm_90")
        {'PDL': True}
    """
    before = getattr(_thread, "decoding", False)
    _thread.decoding = True
    try:
        yield
    finally:
        _thread.decoding = before


@contextlib.contextmanager
def override(kernel: str, *names: str) -> Iterator[None]:
    """Inside the block, ``kernel`` uses exactly these features of SUPPORTED, where the architecture has them.

    Example:
        >>> with features.override("attention", "DESCRIPTORS"):
        ...     features.used("attention", "sm_90")
        {'DESCRIPTORS': True}
    """
    unknown = set(names) - set(SUPPORTED[kernel])
    if unknown:
        raise ValueError(f"{kernel} has no features {sorted(unknown)}; choose from {sorted(SUPPORTED[kernel])}")
    previous = _tried.get(kernel)
    _tried[kernel] = names
    try:
        yield
    finally:
        del _tried[kernel]
        if previous is not None:
            _tried[kernel] = previous


def used(kernel: str, arch: str, rows: int | None = None) -> dict[str, bool]:
    """Constexpr arguments: the features that ``kernel`` uses for ``rows`` tokens (None: many)."""
    on = _tried.get(kernel)
    if on is None:
        enough = rows is None or rows >= DEFAULT_FROM.get(kernel, 0)
        on = (
            DEFAULT.get((kernel, arch), ())
            if enough and (kernel != "decoding" or getattr(_thread, "decoding", False))
            else ()
        )
    return {name: name in on and arch in where for name, where in SUPPORTED[kernel].items()}
