"""Kernel selection on the CPU, ours or PyTorch's, by kind of work: measured once per machine, and kept.

A kind names work that either side can do: "linear bf16, many tokens". ``settle`` measures both on slices of a model's
shapes and keeps the times in the cache folder; ``chosen`` is asked at every call. Until a kind is measured, or if
QVL_TUNE=0, a static table answers. An answer stays until the process ends.
"""

import functools
import hashlib
import json
import math
import os
import platform
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from qvl_kernels import config, dispatch
from qvl_kernels.library import ops_are_seen

__all__ = [
    "FUSED_MARGIN",
    "MARGIN",
    "PYTORCH",
    "QVL",
    "SECONDS",
    "TILE_K",
    "Times",
    "Work",
    "attention_kind",
    "describe",
    "linear_kind",
    "measure",
    "chosen",
    "settle",
]

QVL, PYTORCH = "qvl", "pytorch"
# PyTorch's kernel is chosen where it is this many times as fast as ours; for linear layers of prompts more, because
# with them the fused layers go: the whole model was 1.6 times slower where PyTorch's measured 1.17 times as fast.
MARGIN, FUSED_MARGIN = 1.05, 1.5
SECONDS = 0.3  # for all kinds together
RUNS, FEWEST_RUNS = 6, 5  # of either side, wanted and needed; runs that other programs disturb do not count
SMALLEST = 16  # measuring begins with this part of the work, so that slow machines keep to the time

# PyTorch's kernels are offered whole tiles of this many elements of K only: oneDNN (3.12, in torch 2.13) loads the last
# tile past the end of a row and relies on zeros in the other matrix's tile. A NaN or infinity behind the row (the next
# row, or a gap) would make this row NaN too [oneDNN #5717].
TILE_K = 32

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Fields of /proc/cpuinfo: x86, then Arm.
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags") + (
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
    "CPU revision",
    "Features",
)
_LIMITS = ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA")  # variables that bound PyTorch's kernels


class Times(NamedTuple):
    """Milliseconds of either side for the same work."""

    qvl: float
    pytorch: float

    def chosen(self, kind: str) -> str:
        fused = kind.startswith("linear") and kind.endswith("many tokens")
        return PYTORCH if self.qvl >= (FUSED_MARGIN if fused else MARGIN) * self.pytorch else QVL


class Work(NamedTuple):
    """Work of one kind, of the shape that a model has.

    ``calls(size)`` returns what runs a slice of it, by backend: {QVL: ..., PYTORCH: ...}; ``size`` is all of it.
    """

    kind: str
    shape: str
    size: int
    calls: Callable[[int], dict[str, Callable[[], object]]]

    @property
    def name(self) -> str:
        return f"{self.kind} ({self.shape})"


_answers: dict[str, Times] = {}  # by kind
_lock = threading.Lock()


@functools.cache
def linear_kind(dtype: torch.dtype, few: bool, bits: int | None = None) -> str:
    """The kind of linear layers over tokens of ``dtype``; ``bits`` of quantised weights."""
    weights = "" if bits is None else f" with int{bits} weights"
    return f"linear {_DTYPES.get(dtype, dtype)}{weights}, {'few' if few else 'many'} tokens"


@functools.cache
def attention_kind(dtype: torch.dtype, causal: bool) -> str:
    """The kind of attention of many tokens."""
    return f"{'causal ' if causal else ''}attention {_DTYPES.get(dtype, dtype)}, many tokens"


def chosen(kind: str) -> str:
    """QVL or PYTORCH: whose kernels do work of this kind in this process."""
    times = _answers.get(kind)
    return _static_choice(kind) if times is None else times.chosen(kind)


@functools.cache
def _static_choice(kind: str) -> str:
    """PyTorch's for bf16 prefill on CPUs with matrix units (AMX) if only its kernels can use them; else ours."""
    matrix_units = linear_kind(torch.bfloat16, few=False), *(attention_kind(torch.bfloat16, c) for c in (False, True))
    by_pytorch = torch.cpu._is_amx_tile_supported() and "amx" not in dispatch.extension().supported_isas().split(", ")
    return PYTORCH if kind in matrix_units and by_pytorch else QVL


def settle(works: Sequence[Work]) -> None:
    """Finds the answers of kinds that have none yet: those kept for this machine, or else measured in ``SECONDS``.

    Random state, grad mode and the number of threads do not change. Does nothing if QVL_TUNE=0, a backend is forced, or
    something in this thread traces, compiles, or fakes PyTorch's operations.

    Args:
        works: one per kind.
    Raises: ValueError unless QVL_TUNE is 0 or 1.
    Example:
        >>> tuning.settle([linear_work(torch.bfloat16, 6144, 2048, few=False)])
    """
    if not config.tuning_wanted() or dispatch.forced() is not None or _is_traced():
        return
    with _lock:
        open_works = [work for work in works if work.kind not in _answers]
        if not open_works:
            return
        machine = _machine()
        kept = _load(machine)
        _answers.update((work.kind, kept[work.name]) for work in open_works if work.name in kept)
        found = measure([work for work in open_works if work.name not in kept])
        if found:
            _answers.update((work.kind, found[work.name]) for work in open_works if work.name in found)
            _store(machine, kept | found)


def describe(works: Sequence[Work]) -> list[str]:
    """A line per kind: whose kernel is chosen, and its time against the other's. Measures nothing.

    Example:
        >>> tuning.describe(works)
        ['linear bf16, many tokens: qvl, 3.1 ms against 4.0 ms']
    """
    kept = _load(_machine()) if config.tuning_wanted() else {}
    return [_line(work.kind, _answers.get(work.kind) or kept.get(work.name)) for work in works]


def _line(kind: str, times: Times | None) -> str:
    if times is None:
        return f"{kind}: {_static_choice(kind)}, not measured"
    backend = times.chosen(kind)
    chosen, other = times if backend == QVL else reversed(times)
    return f"{kind}: {backend}, {chosen:.3g} ms against {other:.3g} ms"


def _is_traced() -> bool:
    return bool(torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or ops_are_seen())


def measure(works: Sequence[Work], clock: Callable[[], float] = time.perf_counter) -> dict[str, Times]:
    """Times of works, by name. Works for which there is no time left are left out."""
    found = {}
    end = clock() + SECONDS
    with torch.no_grad(), torch.device("cpu"):
        for index, work in enumerate(works):
            now = clock()
            if now >= end:
                break
            times = _times(work, now + (end - now) / (len(works) - index), end, clock)
            if times is not None:
                found[work.name] = times
    return found


def _times(work: Work, share: float, end: float, clock: Callable[[], float]) -> Times | None:
    """The fastest of interleaved runs, on the largest slice that can run ``RUNS`` times until ``share``.

    None if there is no time for enough runs before ``end``: the machine is too slow, or too busy to tell.
    """
    size = max(1, work.size // SMALLEST)
    while True:
        calls = work.calls(size)
        _run(calls, clock, end)  # includes what libraries do once per shape
        run = _run(calls, clock, end)
        if size >= work.size or clock() + 4 * RUNS * sum(run or ()) / 1000 > share:
            break
        size = min(4 * size, work.size)
    undisturbed: list[Times] = []
    while run is not None:
        before = _preemptions()
        run = _run(calls, clock, end)
        if run is not None and _preemptions() == before:
            undisturbed.append(run)
        enough = len(undisturbed) >= FEWEST_RUNS
        if len(undisturbed) == 2 * RUNS or enough and clock() + sum(run or ()) / 1000 > share:
            break
    return Times(*map(min, zip(*undisturbed))) if len(undisturbed) >= FEWEST_RUNS else None


def _run(calls: dict[str, Callable[[], object]], clock: Callable[[], float], end: float) -> Times | None:
    """One run of either side; None where time is over before a call."""
    times = []
    for name in (QVL, PYTORCH):
        start = clock()
        if start >= end:
            return None
        calls[name]()
        times.append(1000 * (clock() - start))
    return Times(*times)


def _preemptions() -> int:
    """How often other programs took a core away from this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _machine() -> dict[str, object]:
    """All that the times depend on."""
    extension = dispatch.extension()
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        first = ""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    build = os.stat(str(extension.__file__))
    return {
        "cpu": {name: fields[name] for name in _CPU_FIELDS if name in fields} or platform.processor(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": str(torch.__version__),
        "limits": {name: os.environ.get(name) for name in _LIMITS},
        "extension": [build.st_size, build.st_mtime_ns],
        "isa": extension.isa(),
    }


def _file(machine: dict[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
    return config.cache_folder() / "tuning" / f"{digest[:32]}.json"


def _load(machine: dict[str, object]) -> dict[str, Times]:
    """The times kept for this machine, by name; none if the file is missing, damaged or unreadable."""
    try:
        content = json.loads(_file(machine).read_text())
        times = {name: Times(*map(float, values)) for name, values in content["milliseconds"].items()}
        sound = content["machine"] == machine and all(0 < x < math.inf for pair in times.values() for x in pair)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):  # RuntimeError: no home folder
        return {}
    return times if sound else {}


def _store(machine: dict[str, object], times: dict[str, Times]) -> None:
    """Keeps the times for later processes, where the cache folder can be written."""
    content = json.dumps({"machine": machine, "milliseconds": times}, indent=1)
    temporary = None
    try:
        file = _file(machine)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as out:
            out.write(content)
        os.replace(temporary, file)
    except (OSError, RuntimeError):
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
