"""Launches Triton kernels, or records the launches for the compile check."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Launch", "make_descriptors", "launch", "record", "tensors"]

# FMA contraction of a * b + c rounds once instead of twice, as in PyTorch's own kernels.
FP_FUSION = True


class Launch(NamedTuple):
    """One recorded call of ``launch``, for bench.compile_check."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # of the kernel, and launch options such as num_warps


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


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], **arguments: Any) -> None:
    """kernel[grid](**arguments) on the device of the first tensor; an empty grid launches nothing.

    Arguments may be named tuples (qvl_kernels/gpu/views.py); launch options such as num_warps are among them.
    """
    if 0 in grid:
        return
    arguments.setdefault("enable_fp_fusion", FP_FUSION)
    if arguments.get("PDL"):
        arguments["launch_pdl"] = True
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments))
        return
    device = next(tensors(arguments.values())).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments)
    else:
        kernel[grid](**arguments)


def tensors(arguments: Iterable) -> Iterator[torch.Tensor]:
    """The tensors among kernel arguments, those in tuples too."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors(argument)


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
