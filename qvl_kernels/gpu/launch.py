"""Launches Triton kernels, or records the launches for the compile check."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Launch", "as_rows", "make_descriptors", "launch", "record"]

# FMA contraction of a * b + c rounds once instead of twice, as in PyTorch's own kernels.
FP_FUSION = True


class Launch(NamedTuple):
    """One recorded call of ``launch``, for bench.compile_check."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    args: tuple
    meta: dict


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Inside the block ``launch`` records its arguments and runs nothing.

    Example:
        >>> with gpu_device.assume("sm_90"), gpu_launch.record() as launches:
        ...     launcher(*fake_tensors)
    """
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta) on the device of the first tensor; an empty grid launches nothing."""
    if 0 in grid:
        return
    meta.setdefault("enable_fp_fusion", FP_FUSION)
    if meta.get("DEPENDENT_LAUNCH"):
        meta["launch_pdl"] = True
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., C] as [M, C] with a contiguous last dimension: a view where strides allow it, else a copy."""
    size = x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    rows = x.reshape(x.numel() // size if size else 0, size)
    return rows if size <= 1 or rows.stride(-1) == 1 else rows.contiguous()


def make_descriptors(*tensors: tuple[torch.Tensor, list[int]]) -> tuple[TensorDescriptor, ...] | None:
    """TMA tensor descriptors of (tensor, block shape); None if TMA does not support an address or stride."""
    for x, _ in tensors:
        size = x.element_size()
        if (
            x.numel() == 0
            or x.stride(-1) != 1
            or any(stride <= 0 or stride * size % 16 for stride in x.stride()[:-1])
            or x.data_ptr() % 16
        ):
            return None
    return tuple(TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x, block in tensors)
