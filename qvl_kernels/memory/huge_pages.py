"""Huge pages under weights: a mapped checkpoint lies on 4 KB pages, from which a CPU reads more slowly."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from qvl_kernels import config, dispatch
from qvl_kernels.library import has_memory, is_eligible

__all__ = ["use_huge_pages"]

_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r(.).(.) \S+ \S+ (\d+) *(.*)")
_SPARE = 1 << 30  # bytes of memory that must stay available


def use_huge_pages(tensors: Iterable[torch.Tensor]) -> int:
    """Moves CPU tensors in private memory, such as those of a mapped checkpoint, to 2 MB pages. Linux; elsewhere it
    does nothing.

    Pages are replaced under the tensors: addresses, contents, views and sharing do not change, nor does the file.
    Nothing may write to the tensors meanwhile. Tensors without a whole 2 MB block, or without a free huge page, stay as
    they are. So do all tensors if memory is short: the system can drop pages of a file, but not these.

    Args:
        tensors: any; other than dense CPU tensors are left alone.
    Returns:
        Bytes that are now on huge pages.
    Raises: TypeError unless given an iterable of tensors; ValueError if QVL_HUGE_PAGES is neither 0 nor 1.
    Example:
        >>> qvl_kernels.use_huge_pages(model.parameters())
        3439329280
    """
    wanted, spans = config.huge_pages_wanted(), _spans(tensors)
    if not spans or not wanted or not _enabled():
        return 0
    pieces = [
        (begin, end, is_file, writable)
        for first, last, is_file, writable in _private_maps()
        for begin, end in ((max(first, span[0]), min(last, span[1])) for span in spans)
        if begin < end
    ]
    needed = sum(end - begin for begin, end, is_file, _ in pieces if is_file)
    if needed + _SPARE > _available():
        return 0
    extension = dispatch.extension()
    return sum(
        extension.use_huge_pages(begin, end - begin, is_file, writable) for begin, end, is_file, writable in pieces
    )


def _spans(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Address ranges of the tensors, merged where they touch: one huge page may lie under several tensors."""
    tensors = list(tensors) if isinstance(tensors, Iterable) and not isinstance(tensors, torch.Tensor) else [tensors]
    for x in tensors:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"use_huge_pages: tensors must be an iterable of tensors, got {type(x).__name__}")
    ranges = sorted(
        (x.data_ptr(), x.data_ptr() + x.nbytes)
        for x in tensors
        if is_eligible(x, "cpu") and x.is_contiguous() and x.nbytes and has_memory(x)
    )
    spans: list[tuple[int, int]] = []
    for begin, end in ranges:
        if spans and begin <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((begin, end))
    return spans


def _enabled() -> bool:
    try:
        return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def _private_maps() -> list[tuple[int, int, bool, bool]]:
    """(first address, end address, mapped from a file, writable) of the process's readable private memory."""
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = _MAP.match(line)
        if (
            match
            and match[4] == "p"
            and (match[5] != "0" or match[6] in ("", "[heap]") or match[6].startswith("[anon"))
        ):
            maps.append((int(match[1], 16), int(match[2], 16), match[5] != "0", match[3] == "w"))
    return maps


def _available() -> int:
    """Bytes that can be allocated without swapping."""
    match = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    return int(match[1]) * 1024 if match else 0
