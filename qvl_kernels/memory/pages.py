"""Pages of large CPU tensors: huge pages for tensors that are read often, release of those that are not read again."""

import contextlib
import ctypes
import math
import mmap
import sys
import threading
import weakref

import torch

__all__ = ["empty", "release", "return_freed_memory"]

_HUGE_PAGE = 1 << 21
_SMALL = 1 << 16  # bytes: smaller tensors come from PyTorch's allocator
_SHARED = 8 * _HUGE_PAGE  # bytes of a block that several tensors share
_ALIGNED = 64  # each of them begins at a multiple of so many bytes
_MADV_PAGEOUT = 21


def empty(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, shared: bool = False) -> torch.Tensor:
    """``like.new_empty(shape, dtype=dtype)``, a large one on the CPU in 2 MB pages: reads are up to 1.6 times as fast.

    The memory is mapped for this tensor: memory that an allocator reuses keeps its small pages and is not aligned.

    Args:
        shared: also for tensors of 64 KB to 2 MB, which then share a mapping that is freed with the last of them: for
            tensors that live as long as a model.
    Example:
        >>> values = empty(weight, (2048, 6144), torch.int8)
    """
    size = math.prod(shape) * dtype.itemsize
    eligible = type(like) in (torch.Tensor, torch.nn.Parameter) and like.device.type == "cpu"
    if not eligible or size < (_SMALL if shared else _HUGE_PAGE) or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape, dtype=dtype)
    memory, start = _map(size) if size >= _HUGE_PAGE else _shared.take(size)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


def _map(size: int) -> tuple[mmap.mmap, int]:
    """A new mapping, and the offset of its first 2 MB page, which ``size`` bytes follow."""
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // _HUGE_PAGE * _HUGE_PAGE)
    return memory, start


class _Shared:
    """A mapping that several tensors share; only the tensors keep it alive."""

    def __init__(self) -> None:
        self._lock, self._free, self._end = threading.Lock(), 0, 0
        self._memory: weakref.ref[mmap.mmap] | None = None

    def take(self, size: int) -> tuple[mmap.mmap, int]:
        with self._lock:
            memory = None if self._memory is None else self._memory()
            if memory is None or self._free + size > self._end:
                memory, self._free = _map(_SHARED)
                self._memory, self._end = weakref.ref(memory), self._free + _SHARED
            start = self._free
            self._free += -(-size // _ALIGNED) * _ALIGNED
            return memory, start


_shared = _Shared()


def release(tensor: torch.Tensor) -> None:
    """Drops the pages of a tensor in a mapped file from memory, while the mapping lives on. Values do not change;
    tensors that are not in a file are left alone.

    Example:
        >>> release(weight)  # read, and not needed soon
    """
    if (
        tensor.device.type != "cpu"
        or not sys.platform.startswith("linux")
        or not tensor.is_contiguous()
        or not _is_mapped_file(tensor.data_ptr())
    ):
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:  # if the system refuses, nothing changes
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)


def return_freed_memory() -> None:
    """Returns freed memory to the system (malloc_trim of glibc): the C library may otherwise keep a tenth of what was
    allocated.

    Example:
        >>> return_freed_memory()
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _is_mapped_file(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, _, _, inode = line.split(maxsplit=5)[:5]
            first, last = span.split("-")
            if int(first, 16) <= address < int(last, 16):
                return inode != "0"
    return False
