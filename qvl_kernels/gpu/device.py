"""The present or assumed GPU: whether Triton can run on it, and the architecture that tile choices depend on."""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from importlib.metadata import version

import torch

from qvl_kernels import config

__all__ = ["ARCHITECTURES", "SM_COUNT", "SHARED_MEMORY", "architecture", "assume", "nearest", "unavailable"]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")  # checked by bench.compile_check
SM_COUNT = {
    "sm_80": 108,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
}  # SMs (CUs) of the largest chip of each architecture
# Bytes of shared memory per thread block.
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # Ampere
NO_GPU = "there is no GPU that this PyTorch can use"

_assumed: str | None = None


@contextlib.contextmanager
def assume(name: str) -> Iterator[None]:
    """Inside the block, tiles and backend are chosen as if the GPU were ``name``, to compile kernels without one.

    Example:
        >>> with gpu_device.assume("sm_90"):
        ...     gpu_device.architecture(torch.device("cuda"))
        'sm_90'
    """
    global _assumed
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown GPU architecture {name!r}; choose one of {', '.join(ARCHITECTURES)}")
    previous, _assumed = _assumed, name
    try:
        yield
    finally:
        _assumed = previous


def architecture(device: torch.device) -> str:
    """The entry of ARCHITECTURES to compile for on a device; for the interpreter's CPU tensors one with the smallest
    shared memory.
    """
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return "sm_89"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return nearest(name)


def nearest(name: str) -> str:
    """The entry of ARCHITECTURES whose tiles and instructions also suit the architecture ``name``.

    Example:
        >>> nearest("sm_86"), nearest("sm_103"), nearest("gfx950")
        ('sm_89', 'sm_100', 'gfx942')
    """
    if name in ARCHITECTURES:
        return name
    if name.startswith("gfx"):
        return "gfx942"  # 64 KB of shared memory, which other AMD chips have too
    # sm_87 (Jetson Orin) has the A100's shared memory; sm_101, sm_103 and sm_110 have the tensor memory of sm_100. All
    # others get the smallest tiles.
    return {"sm_87": "sm_80", "sm_101": "sm_100", "sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120"}.get(
        name, "sm_89"
    )


def unavailable(device: torch.device | None = None) -> str | None:
    """Why the Triton kernels cannot run on a GPU (None: the current one), or None."""
    if _assumed is not None:
        return None
    reason = _without_triton()
    if reason is not None or config.interpreted():
        return reason
    index = None if device is None else device.index
    if index is None:
        if not torch.cuda.is_available():
            return NO_GPU
        index = torch.cuda.current_device()
    if torch.compiler.is_compiling():  # tracing must not launch the probe, so this result is not cached
        return _unsupported(index)
    return _unrunnable(index)


@functools.cache
def _without_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    found = tuple(int(part) for part in version("triton").split(".")[:2])
    if found < OLDEST_TRITON:
        return f"Triton {version('triton')} is too old; install 3.6 or newer"
    return None


def _unsupported(index: int) -> str | None:
    if not torch.cuda.is_available():
        return NO_GPU
    capability = torch.cuda.get_device_capability(index)
    if not torch.version.hip and capability < OLDEST_CAPABILITY:
        return f"the GPU is sm_{capability[0]}{capability[1]}; the kernels need sm_80 (Ampere) or newer"
    return None


@functools.cache
def _unrunnable(index: int) -> str | None:
    reason = _unsupported(index)
    if reason is not None:
        return reason
    try:  # e.g. no C compiler for Triton's launchers, or an old driver: fail here, not inside a model
        from qvl_kernels.gpu.probe import probe

        with torch.cuda.device(index):
            probe(torch.device("cuda", index))
    except Exception as error:
        return f"Triton cannot run a kernel here ({type(error).__name__}: {error})"
    return None
