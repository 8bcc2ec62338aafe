"""The cases of ``make bench-gpu`` in the order in which they are measured, and what a run will do."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu import kernels as gpu_kernels
from bench.gpu import models as gpu_models
from bench.gpu import suite
from bench.gpu.results import Results

__all__ = ["ENTRIES", "TESTS", "Entry", "pending", "plan"]

TESTS = "GPU tests"
MEMORY_LIMIT = 8e9  # of the fp16 case, in bytes
UNKNOWN_SECONDS = 15.0  # of a case that was never measured, for the plan
# Ops of which no target speaks, and ops that one H100 was measured with before; both come late.
WITHOUT_TARGETS = ("decode_attention", "linear", "quantized_linear", "patch_embed")
FIRST = ("attention", "linear_cross_entropy", "cross_attention")


@dataclass(frozen=True)
class Entry:
    """A case: how long it may take, what it does on a GPU, and what can be checked of it without one."""

    name: str
    seconds: float
    run: Callable[[], dict]
    build: Callable[[], dict]
    needs: str | None = None  # an optional module that it needs
    compile: Callable[[], dict] | None = None  # compiles its kernels beforehand

    @property
    def installed(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def _cuda() -> torch.device:
    return torch.device("cuda", 0)


def _kernel(case: gpu_kernels.KernelCase) -> Entry:
    return Entry(
        case.name,
        30.0,
        lambda: gpu_kernels.run(case, _cuda()),
        lambda: gpu_kernels.build(case),
        compile=lambda: gpu_kernels.run(case, _cuda(), seconds=0.0),
    )


def _kernels(wanted: Callable[[str], bool]) -> list[Entry]:
    return [_kernel(case) for case in gpu_kernels.CASES if wanted(case.op)]


def _model(
    name: str, seconds: float, function: Callable[..., dict], *, needs: str | None = None, **options: Any
) -> Entry:
    case = functools.partial(function, **options)
    once = dataclasses.replace(gpu_models.FULL, rounds=1, tokens=2)
    compiles = (
        (lambda: case(once, _cuda())) if function in (gpu_models.generate, gpu_models.decode) else None
    )  # the others need more memory
    return Entry(name, seconds, lambda: case(gpu_models.FULL, _cuda()), lambda: gpu_models.build(case), needs, compiles)


def _copy() -> Entry:
    return Entry(
        "copy",
        30.0,
        lambda: gpu_kernels.copy_bandwidth(_cuda()),
        lambda: gpu_kernels.copy_bandwidth(torch.device("cpu"), 1 << 20),
    )


# What was never measured first, what the time does not allow last.
ENTRIES = [
    _copy(),
    *(entry for op in FIRST for entry in _kernels(lambda found, op=op: found == op)),
    _model("generate", 75.0, gpu_models.generate),
    _model("memory stock", 30.0, gpu_models.memory, variant="stock"),
    _model("memory accelerated", 30.0, gpu_models.memory, variant="ours"),
    _model("memory int8", 40.0, gpu_models.memory, variant="int8"),
    _model("train stock", 45.0, gpu_models.train, variant="stock"),
    _model("train accelerated", 45.0, gpu_models.train, variant="ours"),
    _model("decode 32", 60.0, gpu_models.decode, rows=32),
    _model("decode int8", 45.0, gpu_models.decode, rows=1, weights="int8"),
    _model("decode int4", 45.0, gpu_models.decode, rows=1, weights="int4"),
    *_kernels(lambda op: op not in (*FIRST, *WITHOUT_TARGETS)),
    _model("fp16 in 8 GB", 30.0, gpu_models.fits, limit=MEMORY_LIMIT),
    _model("train liger", 45.0, gpu_models.train, needs="liger_kernel", variant="liger"),
    *_kernels(lambda op: op in WITHOUT_TARGETS),
    _model("loss parity", 45.0, gpu_models.parity),
    _model("prompt compiled", 90.0, gpu_models.compiled),
    Entry(TESTS, suite.SECONDS + 2 * suite.GRACE_SECONDS, suite.run, suite.build),
]


def pending(entries: list[Entry], results: Results) -> list[Entry]:
    """The entries that no row counts for yet; tests as long as one of them has no outcome."""
    return [entry for entry in entries if not results.counts(entry.name) or _tests_left(entry, results)]


def _tests_left(entry: Entry, results: Results) -> bool:
    row = results.row(entry.name)
    return entry.name == TESTS and row is not None and bool(row["value"].get("not_run", 0))


def plan(entries: list[Entry], results: Results | None, minutes: float) -> list[str]:
    """A line per entry: what is measured already, and in which run of so many minutes the others come."""
    lines, seconds, number = [], 0.0, 1
    wanted = entries if results is None else pending(entries, results)
    left = {entry.name for entry in wanted if entry.installed}
    for entry in entries:
        if not entry.installed:
            lines.append(f"{entry.name}: left out, {entry.needs} is not installed")
            continue
        if entry.name not in left:
            lines.append(f"{entry.name}: measured")
            continue
        earlier = results.seconds(entry.name) if results is not None else None
        expected = UNKNOWN_SECONDS if earlier is None else earlier
        if seconds and seconds + expected > 60 * minutes:
            seconds, number = 0.0, number + 1
        seconds += expected
        known = f"{expected:.0f} s before" if earlier is not None else f"at most {entry.seconds:.0f} s"
        lines.append(f"{entry.name}: command {number}, {known}")
    last = f"{len(left)} of {len(entries)} cases to measure, in about {number} commands of {minutes:g} minutes"
    return [*lines, last if left else "all is measured"]
