"""Tensors between guard pages: reading or writing one byte outside them ends the process with SIGSEGV.

Inputs are read-only, and gaps between their rows are NaN. Fresh outputs are NaN, and the bytes between them and the far
guard page must not change. Each case is written to build/fuzz_case.txt before it runs, and stays there after a crash;
to run it again:

    PYTHONPATH=tests python -c "import test_fuzz; test_fuzz.check(*eval(open('build/fuzz_case.txt').read()))"
"""

import ctypes
import math
import mmap
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from bounds import assert_within
from kernel_selection import TILE_ISAS, select, selections
from op_cases import outputs

import qvl_kernels

CASE_FILE = Path(__file__).resolve().parents[2] / "build" / "fuzz_case.txt"
PAGE = mmap.PAGESIZE
NO_ACCESS, READ_ONLY = 0, mmap.PROT_READ
_protect = ctypes.CDLL(None, use_errno=True).mprotect
_protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _set_access(address: int, size: int, access: int) -> None:
    if _protect(address, size, access):
        raise OSError(ctypes.get_errno(), "mprotect failed")


class Placed(NamedTuple):
    """Elements that begin right after a guard page, or end right before one; every byte is 0xFF: NaN, or -1 in
    integers.
    """

    memory: torch.Tensor  # uint8: all bytes between the two pages
    begin: int  # bytes of the elements in memory
    end: int
    elements: torch.Tensor

    def neighbours_unchanged(self) -> bool:
        return bool((self.memory[: self.begin] == 0xFF).all() and (self.memory[self.end :] == 0xFF).all())

    def make_read_only(self) -> None:
        _set_access(self.memory.data_ptr(), self.memory.numel(), READ_ONLY)


def place(count: int, dtype: torch.dtype, *, at_end: bool) -> Placed:
    size = count * dtype.itemsize
    inner = max(1, -(-size // PAGE)) * PAGE
    whole = torch.frombuffer(mmap.mmap(-1, inner + 2 * PAGE), dtype=torch.uint8)
    memory = whole[PAGE : PAGE + inner].fill_(0xFF)
    for page in (0, PAGE + inner):
        _set_access(whole.data_ptr() + page, PAGE, NO_ACCESS)
    begin = inner - size if at_end else 0
    return Placed(memory, begin, begin + size, memory[begin : begin + size].view(dtype))


class Layouts:
    """Copies of tensors between guard pages, with strides drawn from a layout number; 0: contiguous, right before the
    last page.
    """

    def __init__(self, number: int) -> None:
        self._plain, self._random = number == 0, random.Random(number)

    def __call__(
        self, x: torch.Tensor, *, dense: int = 1, repeat: bool = False, writable: bool = False
    ) -> torch.Tensor:
        """``x`` with its last ``dense`` dimensions contiguous and the others in any order, with gaps. ``repeat``: one
        of those may be cut to its first element and expanded, with stride 0.
        """
        if x.numel() == 0:
            return x
        shape, free, repeated = list(x.shape), list(range(x.dim() - dense)), None
        if repeat and free and not self._plain and self._random.random() < 0.2:
            repeated = self._random.choice(free)
            shape[repeated] = 1
        strides = self._strides(shape, free)
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
        placed = place(span, x.dtype, at_end=self._plain or self._random.random() < 0.6)
        view = placed.elements.as_strided(shape, strides)
        view.copy_(x if repeated is None else x.narrow(repeated, 0, 1))
        if not writable:
            placed.make_read_only()
        return view.expand(x.shape)

    def _strides(self, shape: list[int], free: list[int]) -> list[int]:
        strides, step = [0] * len(shape), 1
        order = list(free)
        if not self._plain:
            self._random.shuffle(order)
        for dim in reversed(range(len(free), len(shape))):
            strides[dim] = step
            step *= shape[dim]
        for dim in order if not self._plain else reversed(order):
            gap = 0 if self._plain else self._random.choice((0, 0, 1, 3, 8))
            strides[dim] = step + gap
            step = strides[dim] * shape[dim]
        if not self._plain:  # strides of dimensions of size 1 are never used: any value
            for dim, size in enumerate(shape):
                if size == 1 and self._random.random() < 0.3:
                    strides[dim] = self._random.choice((0, 1, 17, 100_003))
        return strides

    def all(self, tensors: NamedTuple, **options) -> NamedTuple:
        """Every tensor of a NamedTuple of weights, quantised weights included."""
        return type(tensors)(
            *(
                self.all(x) if isinstance(x, tuple) else self(x, **options) if isinstance(x, torch.Tensor) else x
                for x in tensors
            )
        )


class FreshOutputs:
    """Replaces ``torch.empty`` and ``torch.empty_like`` inside the block; ``check`` finds writes outside the kernels'
    outputs.
    """

    def __init__(self, number: int) -> None:
        self._random, self._placed, self._by_pytorch = random.Random(number), [], False

    def _linear(self, *arguments) -> torch.Tensor:
        self._by_pytorch = True
        return self._before[2](*arguments)

    def _empty(self, *size, dtype: torch.dtype | None = None, device=None) -> torch.Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        placed = place(math.prod(shape), dtype or torch.float32, at_end=self._random.random() < 0.6)
        self._placed.append(placed)
        return placed.elements.view(shape)

    def __enter__(self) -> "FreshOutputs":
        functional = torch.nn.functional
        self._before = torch.empty, torch.empty_like, functional.linear
        torch.empty, torch.empty_like, functional.linear = (
            self._empty,
            lambda x: self._empty(x.shape, dtype=x.dtype),
            self._linear,
        )
        return self

    def __exit__(self, *_) -> None:
        torch.empty, torch.empty_like, torch.nn.functional.linear = self._before

    def check(self) -> None:
        assert self._placed or self._by_pytorch, (
            "nothing was allocated: the outputs are not guarded"
        )  # PyTorch allocates its own
        assert all(placed.neighbours_unchanged() for placed in self._placed), "a kernel wrote beside its output"


class Trial(NamedTuple):
    """One call, its fp64 reference, and the error bound of each element."""

    call: Callable  # () -> outputs
    golden: tuple[torch.Tensor, ...]  # float64
    slack: tuple[torch.Tensor | float, ...]
    caches: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...] = ()  # written in place: (cache, golden, slack)
    on_tiles: tuple[torch.Tensor, torch.Tensor] | None = None  # golden and slack with matrix units, where they differ


def run(name: str, case: dict, trial: Trial) -> None:
    """Runs ``trial`` with every kernel selection."""
    fresh = [cache.clone() for cache, _, _ in trial.caches]
    for kernels in selections(name, getattr(torch, case["dtype"])):
        for (cache, _, _), values in zip(trial.caches, fresh):
            cache.copy_(values)
        with torch.no_grad(), qvl_kernels.use_backend("cpp"), select(kernels), FreshOutputs(case["layout"]) as memory:
            results = outputs(trial.call())
        memory.check()
        assert len(results) == len(trial.golden)
        expected = [trial.on_tiles] if trial.on_tiles and kernels in TILE_ISAS else zip(trial.golden, trial.slack)
        for index, (out, (golden, slack)) in enumerate(zip(results, expected)):
            assert_within(f"{name} on {kernels}, output {index}", out, golden, slack)
        for index, (cache, golden, slack) in enumerate(trial.caches):
            assert_within(f"{name} on {kernels}, cache {index}", cache, golden, slack)
