"""python -m bench.gpu: the GPU tests, then every kernel and the whole model against stock and other libraries, on the
GPU of this machine.

Each case is a process of its own with a time limit, so that a crash or a hang costs one row. The tests run first, and
beside them all compilation, so that measurements find Triton's cache filled and the machine idle.
bench/results/<gpu>.json is written after every case, a chart at the end. Needs PyTorch, Triton, transformers, pybind11
and a C++ compiler, nothing else, and no network. Without a GPU every case is built instead: its kernels are compiled
for sm_90, its model code runs tiny on the CPU.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu import kernels as gpu_kernels
from bench.gpu import models as gpu_models
from bench.gpu import report as gpu_report
from bench.isolated import Task, run_all
from bench.machine import commit

__all__ = ["ENTRIES", "Entry", "main"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
MINUTES = 8.8  # all of it: under nine with start and report
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "flash-attn")
MEMORY_LIMIT = 8e9  # of the fp16 case, in bytes
TEST_SECONDS = 120.0
GRACE_SECONDS = 15.0  # for the running test to end after the interrupt
INTERRUPTED = 2  # pytest's exit status then
COMPILING = 4  # processes beside the tests
COMPILE_SECONDS = 120.0
WITHOUT_TARGETS = ("decode_attention", "linear", "quantized_linear", "patch_embed")  # ops
BUILD_SECONDS = 180.0


@dataclass(frozen=True)
class Entry:
    """A case: how long it may take, what it does on a GPU, and what can be checked of it without one."""

    name: str
    seconds: float
    run: Callable[[], dict]
    build: Callable[[], dict]
    needs: str | None = None  # an optional module that it needs
    compile: Callable[[], dict] | None = None  # compiles its kernels beforehand
    early: bool = False  # while others compile: nothing in it is timed

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


def _model(
    name: str, seconds: float, function: Callable[..., dict], *, needs: str | None = None, **options: Any
) -> Entry:
    case = functools.partial(function, **options)
    once = dataclasses.replace(gpu_models.FULL, rounds=1, tokens=2)
    compiles = (
        (lambda: case(once, _cuda())) if function in (gpu_models.generate, gpu_models.decode) else None
    )  # the others need more memory
    return Entry(name, seconds, lambda: case(gpu_models.FULL, _cuda()), lambda: gpu_models.build(case), needs, compiles)


class _Pytest:
    """pytest in a process of its own."""

    def __init__(self, root: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]
        self._file, self.killed = tempfile.TemporaryFile("w+"), False
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def stop_at(self, deadline: float) -> None:
        """Interrupts pytest at the deadline, so that it prints its summary."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)

    def output(self, deadline: float) -> str:
        """What it printed; killed where it does not end before ``deadline``."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.killed = True
            self.process.kill()
            self.process.wait()
        with self._file as file:
            file.seek(0)
            return file.read()


def _counts(output: str) -> dict[str, int]:
    """ "3 failed, 70 passed, 1 skipped in 2.1s" -> numbers; errors count as failures."""
    last = next(
        (
            line
            for line in reversed(output.splitlines())
            if " in " in line and re.search(r"\d+ (passed|failed|error|skipped)", line)
        ),
        "",
    )
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    return {
        "passed": found.get("passed", 0),
        "failed": found.get("failed", 0) + found.get("error", 0),
        "skipped": found.get("skipped", 0),
    }


def run_tests(
    folder: str = "tests/gpu", root: Path = ROOT, jobs: int | None = None, seconds: float = TEST_SECONDS
) -> dict:
    """Runs the GPU tests in several processes, since most of their time is compilation. {"passed", "failed", "skipped",
    "not_run": those that ``seconds`` did not suffice for, "failures", "crashed"}.
    """
    deadline = time.monotonic() + seconds
    collected = _Pytest(root, "--collect-only", folder)
    collected.stop_at(deadline)
    listed = collected.output(deadline + GRACE_SECONDS)
    tests = [line for line in listed.splitlines() if "::" in line]
    if not tests:
        raise RuntimeError(f"no tests were found in {folder}: {listed[-500:].strip()}")
    jobs = min(jobs or max(1, len(os.sched_getaffinity(0)) - COMPILING), len(tests))
    random.Random(0).shuffle(tests)  # slow ones stand together
    running = [_Pytest(root, *tests[index::jobs]) for index in range(jobs)]
    for one in running:
        one.stop_at(deadline)
    outputs = [one.output(deadline + GRACE_SECONDS) for one in running]
    counts = [_counts(output) for output in outputs]
    failures = [line for output in outputs for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    total = {word: sum(count[word] for count in counts) for word in ("passed", "failed", "skipped")}
    crashed = [
        output[-300:]
        for one, output in zip(running, outputs)
        if one.process.returncode not in (0, 1, INTERRUPTED, 5) and not one.killed
    ]
    return {**total, "not_run": len(tests) - sum(total.values()), "failures": failures[:50], "crashed": crashed}


def _build_tests() -> dict:
    """Without a GPU: whether the test files compile."""
    files = sorted((ROOT / "tests" / "gpu").glob("*.py"))
    for file in files:
        compile(file.read_text(), str(file), "exec")
    return {"files": [file.name for file in files]}


def _copy_entry() -> Entry:
    return Entry(
        "copy",
        30.0,
        lambda: gpu_kernels.copy_bandwidth(_cuda()),
        lambda: gpu_kernels.copy_bandwidth(torch.device("cpu"), 1 << 20),
    )


# In order of importance: what the time does not allow comes last.
ENTRIES = [
    Entry("GPU tests", TEST_SECONDS + 2 * GRACE_SECONDS, run_tests, _build_tests, early=True),
    _copy_entry(),
    _model("generate", 75.0, gpu_models.generate),
    _model("decode 32", 60.0, gpu_models.decode, rows=32),
    _model("train stock", 45.0, gpu_models.train, variant="stock"),
    _model("train accelerated", 45.0, gpu_models.train, variant="ours"),
    _model("memory stock", 30.0, gpu_models.memory, variant="stock"),
    _model("memory accelerated", 30.0, gpu_models.memory, variant="ours"),
    _model("memory int8", 40.0, gpu_models.memory, variant="int8"),
    _model("fp16 in 8 GB", 30.0, gpu_models.fits, limit=MEMORY_LIMIT),
    *(_kernel(case) for case in gpu_kernels.CASES if case.op not in WITHOUT_TARGETS),
    _model("decode int8", 45.0, gpu_models.decode, rows=1, weights="int8"),
    _model("decode int4", 45.0, gpu_models.decode, rows=1, weights="int4"),
    _model("train liger", 45.0, gpu_models.train, needs="liger_kernel", variant="liger"),
    *(_kernel(case) for case in gpu_kernels.CASES if case.op in WITHOUT_TARGETS),
    _model("loss parity", 45.0, gpu_models.parity),
    _model("prompt compiled", 90.0, gpu_models.compiled),
]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def _preload() -> None:
    """Imports in the driver what its cases would import one by one, seconds each. Nothing in it may initialise CUDA, or
    forked processes could not use it; ``probe`` checks that.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # is_available() without initialising CUDA
    for name in ("triton", "transformers.models.qwen3_vl.modeling_qwen3_vl", "qvl_model"):
        importlib.import_module(name)


def probe() -> dict | None:
    """The GPU and the versions, or None without one. In a process of its own: the driver must stay free of CUDA to
    fork.
    """
    if not torch.cuda.is_available():
        return None
    torch.zeros(1, device="cuda").item()  # raises if CUDA was initialised before the fork
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(0)),
        "versions": _versions(),
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _scheduled(entries: list[Entry], deadline: float, result: dict, say: Callable[[str], None]) -> Iterator[Task]:
    """Each entry with the time that it may take; what there is no time for is noted instead."""
    for entry in entries:
        left = deadline - time.monotonic()
        if not entry.installed:
            result["cases"][entry.name] = {"error": f"left out: {entry.needs} is not installed"}
            continue
        if left < 5.0:
            result["cases"][entry.name] = {"error": "left out: the time was up"}
            continue
        say(f"{entry.name} ...")
        yield entry.name, entry.run, min(entry.seconds, left)


def _compile(
    entries: list[Entry], deadline: float, result: dict, say: Callable[[str], None], save: Callable[[], None]
) -> list[Entry]:
    """Runs the early entries and compiles kernels beside them; returns the entries left to measure. What fails to
    compile fails again there.
    """
    early = list(_scheduled([entry for entry in entries if entry.early], deadline, result, say))
    later = [entry for entry in entries if not entry.early]
    end = min(deadline, time.monotonic() + COMPILE_SECONDS)

    def tasks() -> Iterator[Task]:
        yield from (((name, True), run, seconds) for name, run, seconds in early)
        for entry in later:
            left = end - time.monotonic()
            if entry.compile and entry.installed and left > 5.0:
                yield (entry.name, False), entry.compile, min(entry.seconds, left)

    for (name, kept), answer in run_all(tasks(), jobs=len(early) + COMPILING):
        if kept:
            result["cases"][name] = answer
            save()
        say(f"{name}: {answer.get('error', 'done' if kept else 'compiled')}")
    return later


def _measure(entries: list[Entry], gpu: dict, arguments: argparse.Namespace, start: float) -> int:
    result = {"gpu": gpu, "date": datetime.date.today().isoformat(), "commit": commit(), "cases": {}}
    file = arguments.output / f"{_slug(gpu['name'])}.json"
    file.parent.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {text}", flush=True)

    def save() -> None:
        file.write_text(json.dumps(result, indent=1) + "\n")

    deadline = start + 60 * arguments.minutes
    entries = _compile(entries, deadline, result, say, save)
    for name, answer in run_all(_scheduled(entries, deadline, result, say)):
        result["cases"][name] = answer
        if "error" in answer:
            say(f"{name}: {answer['error']}")
        save()
    save()
    print("\n" + gpu_report.tables(result))
    chart_file = file.with_suffix(".png")
    drawn = gpu_report.chart(result, chart_file)
    print(f"\nwritten: {file}" + (f" and {chart_file}" if drawn else "; no chart, since matplotlib is not installed"))
    failed = result["cases"].get("GPU tests", {}).get("value", {})
    return 1 if failed.get("failed") or failed.get("crashed") else 0


def _in_one_thread(build: Callable[[], dict]) -> dict:
    """A forked process whose parent has used OpenMP hangs when it opens a team of its own; a team of one is none."""
    torch.set_num_threads(1)
    return build()


def _build(entries: list[Entry]) -> int:
    """Builds every case. 1 if one of them cannot be built."""
    print("no GPU: every case is built, nothing is measured")
    failed = 0
    for entry in entries:
        if not entry.installed:
            print(f"{entry.name}: left out, {entry.needs} is not installed")
    entries = [entry for entry in entries if entry.installed]
    for name, answer in run_all(
        (entry.name, functools.partial(_in_one_thread, entry.build), BUILD_SECONDS) for entry in entries
    ):
        value = answer.get("value", {})
        wrong = answer.get("error") or "; ".join(value.get("violations", []))
        failed += bool(wrong)
        built = ", ".join(value.get("kernels", [])) or (
            "the reference, which has no kernel of its own" if "kernels" in value else "built"
        )
        print(f"{name}: {wrong or built}", flush=True)
    print(f"no GPU: {len(entries) - failed} of {len(entries)} cases built")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """0: measured, or built without a GPU; 1: GPU tests failed, or a case could not be built."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--case", action="append", help="only cases whose name contains this (may be repeated)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time for everything (default {MINUTES:g})")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the result files (default bench/results)"
    )
    parser.add_argument(
        "--no-preload",
        action="store_true",
        help="let every case import for itself (chosen by itself where importing touches the GPU)",
    )
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    entries = [entry for entry in ENTRIES if not arguments.case or any(part in entry.name for part in arguments.case)]
    if not entries:
        parser.error(f"no case is called like that; there are: {', '.join(entry.name for entry in ENTRIES)}")
    if not arguments.no_preload:
        _preload()
    ((_, probed),) = run_all([("probe", probe, 60.0)])
    if "error" in probed and not arguments.no_preload:
        os.execv(
            sys.executable,
            [sys.executable, "-m", "bench.gpu", *(sys.argv[1:] if argv is None else argv), "--no-preload"],
        )
    if "error" in probed:
        print(f"bench.gpu: the GPU does not answer: {probed['error']}\n{probed['log']}", file=sys.stderr)
        return 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _build(entries) if probed["value"] is None else _measure(entries, probed["value"], arguments, start)


if __name__ == "__main__":
    sys.exit(main())
