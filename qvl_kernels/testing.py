"""Helpers for tests and benchmarks: error against an fp64 reference, seeded random inputs, poisoned memory."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qvl_kernels import dispatch

__all__ = [
    "Case",
    "GuardedEmpty",
    "assert_close_to_fp64",
    "instruction_set",
    "poisoned_empty",
    "random_tensor",
    "relative_error",
    "surrounded",
]


@dataclass(frozen=True)
class Case:
    """One input of an op, shared by tests and benchmarks.

    ``make(dtype, generator)`` returns the keyword arguments of the public function; ``flops`` and ``bytes`` are the
    work and memory traffic of the roofline (``bytes`` takes the element size in bytes). ``model`` marks real model
    shapes (benchmarked).
    """

    name: str
    make: Callable[[torch.dtype, torch.Generator], dict]
    flops: float = 0.0
    bytes: Callable[[int], float] = lambda element_size: 0.0
    model: bool = False


def random_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, *, scale: float = 1.0
) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@contextlib.contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """Runs the C++ kernels of this instruction set inside the block, whatever the CPU's best is.

    Example:
        >>> with instruction_set("portable"):
        ...     y = qvl_kernels.rms_norm(x, weight)
    """
    extension = dispatch.extension()
    before = extension.isa()
    extension.use_isa(isa)
    try:
        yield
    finally:
        extension.use_isa(before)


def relative_error(out: torch.Tensor, golden: torch.Tensor) -> float:
    """||out - golden|| / ||golden|| in float64; ``golden`` is the fp64 reference."""
    out, golden = out.double(), golden.double()
    norm = golden.norm().item()
    return (out - golden).norm().item() / (norm if norm > 0 else 1.0)


def assert_close_to_fp64(
    out: torch.Tensor, baseline: torch.Tensor, golden: torch.Tensor, *, factor: float = 2.0, floor: float | None = None
) -> None:
    """``out`` must be at most ``factor`` times as far from the fp64 reference ``golden`` as PyTorch in the working
    dtype.

    ``floor`` (default: 2 units in the last place of out's dtype) is allowed whatever the baseline's error.
    """
    assert out.shape == golden.shape, f"shape {tuple(out.shape)}, expected {tuple(golden.shape)}"
    assert out.dtype == baseline.dtype, f"dtype {out.dtype}, expected {baseline.dtype}"
    floor = 2 * torch.finfo(out.dtype).eps if floor is None else floor
    error, limit = relative_error(out, golden), max(factor * relative_error(baseline, golden), floor)
    if not error <= limit:  # also catches NaN
        difference = (out.double() - golden.double()).abs().nan_to_num(nan=float("inf"))
        worst = int(difference.argmax())
        raise AssertionError(
            f"relative error {error:.3e} > {limit:.3e}; worst element {worst} of shape {tuple(out.shape)}: "
            f"got {out.flatten()[worst].item()}, golden {golden.flatten()[worst].item()}"
        )


_empty = torch.empty


def poisoned_empty(*size: Any, **options: Any) -> torch.Tensor:
    """``torch.empty`` filled with NaN: an element that a kernel forgets to write fails the comparison."""
    out = _empty(*size, **options)
    return out.fill_(float("nan")) if out.is_floating_point() else out


BORDER_BYTES = 1024  # on each side; 0xFF in every byte is NaN in fp32, bf16 and fp16, and -1 in integers


def _surrounded_storage(elements: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(all bytes, the elements in their middle), every byte 0xFF."""
    payload = elements * dtype.itemsize
    memory = _empty(payload + 2 * BORDER_BYTES, dtype=torch.uint8, device=device).fill_(0xFF)
    return memory, memory[BORDER_BYTES : BORDER_BYTES + payload].view(dtype)


def surrounded(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` with the same strides whose surroundings and gaps between rows are NaN (-1 in integers)."""
    if x.numel() == 0 or x.dtype == torch.bool:
        return x
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    _, elements = _surrounded_storage(span, x.dtype, x.device)
    return elements.as_strided(x.shape, x.stride()).copy_(x)


class GuardedEmpty:
    """Stands in for ``torch.empty``: fresh tensors are NaN, and ``check`` finds writes beside them.

    Example:
        >>> guard = GuardedEmpty()
        >>> monkeypatch.setattr(torch, "empty", guard)
        >>> launch_something(x)
        >>> guard.check()
    """

    def __init__(self) -> None:
        self._memories: list[torch.Tensor] = []

    def __call__(
        self, *size: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        memory, elements = _surrounded_storage(
            torch.Size(shape).numel(), dtype or torch.get_default_dtype(), torch.device(device or "cpu")
        )
        self._memories.append(memory)
        return elements.view(shape)

    def check(self) -> None:
        for memory in self._memories:
            borders = torch.cat((memory[:BORDER_BYTES], memory[-BORDER_BYTES:]))
            assert bool((borders == 0xFF).all()), "a kernel wrote outside its output"
