"""Backend selection: the fast backend of the tensor's device, else the reference; each reason is reported once."""

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch
from torch.autograd import forward_ad

from qvl_kernels import config
from qvl_kernels.gpu import device as gpu_device

__all__ = ["backends", "choose", "cpu_info", "extension", "fallbacks", "forced", "use_backend"]

BACKENDS = ("reference", "cpp", "triton")
FAST_BACKEND = {"cpu": "cpp", "cuda": "triton"}

_forced: str | None = None
_fallbacks: dict[str, None] = {}  # "op: reason" in order of appearance


def _load_extension() -> tuple[ModuleType | None, str | None]:
    """(qvl_kernels._C, why it is missing). Only the one in this folder: another may be built from other sources."""
    name, here = "qvl_kernels._C", Path(__file__).parent
    if PathFinder.find_spec(name, [str(here)]) is None:
        folders = [str(Path(entry or ".").resolve() / here.name) for entry in sys.path]
        found = [str(spec.origin) for finder in sys.meta_path if (spec := finder.find_spec(name, folders)) is not None]
        if found:
            raise ImportError(
                f"{here} has no built extension and hides the qvl_kernels installed in {Path(found[0]).parents[1]}: "
                f"run Python from another "
                f"folder (and without {here.parent} in PYTHONPATH), or build the extension there: python setup.py "
                f"build_ext --inplace"
            )
        return None, "the C++ extension qvl_kernels._C is not built; build it with: pip install -e ."
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        return None, f"the C++ extension qvl_kernels._C cannot be imported ({error}); build it with: pip install -e ."


_extension, _extension_error = _load_extension()


def extension() -> ModuleType:
    """The C++ extension module, or RuntimeError with the command that builds it."""
    if _extension is None:
        raise RuntimeError(f"qvl_kernels: {_extension_error}")
    return _extension


def _unavailable(backend: str, device: torch.device | None = None) -> str | None:
    """Why ``backend`` cannot run here (or on ``device``), or None."""
    if backend == "cpp":
        return _extension_error
    return gpu_device.unavailable(device) if backend == "triton" else None


def _runs_on(backend: str, device: torch.device) -> bool:
    return FAST_BACKEND.get(device.type) == backend or (
        backend == "triton" and device.type == "cpu" and config.interpreted()
    )


def forced() -> str | None:
    """The backend that ``use_backend`` or QVL_BACKEND forces, or None."""
    return _forced


def backends() -> dict[str, dict]:
    """The backends by name: whether each is available, and if not, why.

    Example:
        >>> qvl_kernels.backends()["reference"]
        {'available': True, 'reason': None}
    """
    return {name: {"available": _unavailable(name) is None, "reason": _unavailable(name)} for name in BACKENDS}


def _check_name(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name of a backend must be one of {', '.join(BACKENDS)}, got {type(name).__name__}")
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend inside the block. A forced backend never falls back: calls that it cannot run raise
    RuntimeError.

    Raises: TypeError or ValueError unless ``name`` is in ``backends()``.
    Example:
        >>> with qvl_kernels.use_backend("reference"):
        ...     y = qvl_kernels.rms_norm(x, weight)
    """
    global _forced
    previous, _forced = _forced, _check_name(name)
    try:
        yield
    finally:
        _forced = previous


_environment_backend = config.backend_from_environment()
if _environment_backend is not None:
    _forced = _check_name(_environment_backend)


def fallbacks() -> list[str]:
    """ "op: reason" of every fallback to the reference in this process."""
    return list(_fallbacks)


def choose(op: str, device: torch.device, unsupported: str | None = None) -> str:
    """The backend for one call of ``op``. ``unsupported``: why the fast backend cannot run this case, or None."""
    fast = FAST_BACKEND.get(device.type)
    if _forced == "reference":
        return "reference"
    if forward_ad._current_level >= 0:
        unsupported = (
            unsupported
            or "forward-mode AD is on (torch.autograd.forward_ad, torch.func.jvp), of which the kernels know nothing"
        )
    if _forced is not None:
        reason = _unavailable(_forced, device)
        if reason is None and not _runs_on(_forced, device):
            reason = f"it does not run on {device.type} tensors"
        reason = reason or unsupported
        if reason is not None:
            raise RuntimeError(
                f"{op}: backend {_forced!r} was forced but cannot run this call: {reason}. "
                f"Backends: {', '.join(BACKENDS)}."
            )
        return _forced
    if fast == "cpp" and _extension is None:
        extension()
    if fast is None:
        reason = f"there are no fast kernels for {device.type} tensors"
    else:
        reason = _unavailable(fast, device) or unsupported
        if reason is None:
            return fast
    if not torch.compiler.is_compiling():
        _note_fallback(op, reason)
    return "reference"


def _note_fallback(op: str, reason: str) -> None:
    case = f"{op}: {reason}"
    if case not in _fallbacks:
        _fallbacks[case] = None
        warnings.warn(f"qvl_kernels: {op} runs on the reference backend: {reason}", RuntimeWarning, stacklevel=4)


def cpu_info() -> dict:
    """Instruction sets (used and supported), GEMM kernel selection and threads of the C++ backend.

    Example:
        >>> qvl_kernels.cpu_info()["isa"]
        'avx512_bf16'
    """
    c = extension()
    return {
        "isa": c.isa(),
        "supported": c.supported_isas().split(", "),
        "gemm_backend": {name: c.gemm_backend(code) for name, code in (("fp32", 0), ("bf16", 1), ("fp16", 2))},
        "threads": c.max_threads(),
    }
