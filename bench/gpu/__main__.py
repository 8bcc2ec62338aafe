"""python -m bench.gpu: every kernel and the whole model against stock and other libraries on the GPU of this machine,
then the GPU tests.

Each case is a process of its own with a time limit, so that a crash or a hang costs one row. Kernels are compiled
before, beside the C++ extension, so that measurements find Triton's cache filled and the machine idle. Rows are added
to bench/results/<gpu>.json after every case, and printed as lines of JSON; a later run measures what is missing, or was
measured with another source, driver or version. Needs PyTorch, Triton, transformers, pybind11 and a C++ compiler,
nothing else, and no network. Without a GPU every case is built instead: its kernels are compiled for sm_90, its model
code runs tiny on the CPU.
"""

import argparse
import functools
import importlib
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.gpu import report as gpu_report
from bench.gpu import suite
from bench.gpu.plan import ENTRIES, TESTS, Entry, pending, plan
from bench.gpu.results import Results
from bench.isolated import Task, run_all

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
MINUTES = 8.8  # all of it: under nine with start and report
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "flash-attn")
COMPILING = 4  # processes
COMPILE_SECONDS = 120.0
BUILD_SECONDS = 180.0
START = "QVL_BENCH_START"  # environment variable: when make began, in seconds since 1970


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
        "driver": _driver(),
        "versions": _versions(),
    }


def _driver() -> str | None:
    """The version of the GPU's driver."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        return next(word for word in line.split() if word[0].isdigit() and "." in word)
    except (OSError, StopIteration, IndexError):
        return torch.version.hip


def _build_extension() -> dict:
    """The C++ extension in the source tree, if it is not there yet."""
    code = "from qvl_kernels import dispatch; dispatch.extension()"
    if subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0:
        return {"built": False}
    environment = {**os.environ, "QVL_BUILD_JOBS": str(len(os.sched_getaffinity(0)))}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    return {"built": True}


def _compile(entries: list[Entry], deadline: float, say: Callable[[str], None]) -> None:
    """Compiles the kernels of the entries, and the extension beside them. What fails to compile fails again where it is
    measured.
    """
    end = min(deadline, time.monotonic() + COMPILE_SECONDS)

    def tasks() -> Iterator[Task]:
        yield "the extension", _build_extension, max(1.0, end - time.monotonic())
        for entry in entries:
            left = end - time.monotonic()
            if entry.compile and entry.installed and left > 5.0:
                yield entry.name, entry.compile, min(entry.seconds, left)

    for name, answer in run_all(tasks(), jobs=COMPILING):
        say(f"{name}: {answer.get('error', 'compiled')}")


def _scheduled(entries: list[Entry], deadline: float, results: Results, say: Callable[[str], None]) -> Iterator[Task]:
    """Each entry with the time that it may take; what there is no time for is noted instead."""
    for entry in entries:
        left = deadline - time.monotonic()
        if not entry.installed:
            results.put(entry.name, {"error": f"left out: {entry.needs} is not installed"})
        elif left < 5.0:
            results.put(entry.name, {"error": "left out: the time was up"})
        else:
            say(f"{entry.name} ...")
            yield entry.name, _timed(entry.run), min(entry.seconds, left)


def _timed(run: Callable[[], dict]) -> Callable[[], tuple[dict, float]]:
    def timed() -> tuple[dict, float]:
        start = time.monotonic()
        return run(), time.monotonic() - start

    return timed


def _tests(entry: Entry, results: Results, part: tuple[int, int], deadline: float) -> Entry:
    """The entry of the tests, of one part of them, without those that passed before."""
    before = (results.row(TESTS) or {}).get("value", {}) if results.counts(TESTS) else {}
    passed = [test for test, outcome in before.get("outcomes", {}).items() if outcome != "failed"]
    seconds = max(1.0, deadline - time.monotonic() - 2 * suite.GRACE_SECONDS)

    def run() -> dict:
        return suite.merged(before, suite.run(part=part, done=passed, seconds=min(seconds, suite.SECONDS)))

    return Entry(TESTS, entry.seconds, run if entry.run is suite.run else entry.run, entry.build)


def _measure(entries: list[Entry], results: Results, arguments: argparse.Namespace, start: float) -> int:
    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {text}", flush=True)

    deadline = start + 60 * arguments.minutes
    left = pending(entries, results)
    say(f"{len(entries) - len(left)} of {len(entries)} cases are measured already")
    _compile(left, deadline, say)
    cases = [entry for entry in left if entry.name != TESTS]
    for name, answer in run_all(_scheduled(cases, deadline, results, say)):
        _put(results, name, answer)
    for entry in left:
        if entry.name == TESTS:
            tests = _tests(entry, results, arguments.tests or (1, 1), deadline)
            for name, answer in run_all(_scheduled([tests], deadline, results, say)):
                _put(results, name, answer)
    results.save()
    print("\n" + gpu_report.tables(results.values))
    chart_file = results.file.with_suffix(".png")
    drawn = gpu_report.chart(results.values, chart_file)
    print(
        f"\nwritten: {results.file}"
        + (f" and {chart_file}" if drawn else "; no chart, since matplotlib is not installed")
    )
    values = [row.get("value", {}) for row in results.values["cases"].values()]
    return 1 if any(v.get("failed") or v.get("crashed") or "ours" in v.get("unavailable", {}) for v in values) else 0


def _put(results: Results, name: str, answer: dict) -> None:
    if "value" in answer:
        value, seconds = answer["value"]
        results.put(name, {"value": value}, seconds)
    else:
        results.put(name, answer)


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


def _part(text: str) -> tuple[int, int]:
    """ "2/3" as (2, 3)."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"takes I/N with I from 1 to N, such as 1/2; got {text!r}")
    return int(part), int(parts)


def _start() -> float:
    """When make began, on the monotonic clock; now, if it was not make."""
    try:
        gone = time.time() - float(os.environ[START])
    except (KeyError, ValueError):
        return time.monotonic()
    return time.monotonic() - gone if 0 <= gone < 3600 else time.monotonic()


def main(argv: list[str] | None = None) -> int:
    """0: measured, or built without a GPU; 1: GPU tests failed, or a case could not be built."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--case", action="append", metavar="NAME", help="only the case of this name (may be repeated)")
    parser.add_argument("--tests", type=_part, metavar="I/N", help="only the tests, and of them the I-th part of N")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows of this GPU")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured, with its time")
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
    start = _start()
    names = [entry.name for entry in ENTRIES]
    wanted = [TESTS] if arguments.tests else arguments.case or names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no case is called {unknown[0]!r}; there are: {', '.join(names)}")
    entries = [entry for entry in ENTRIES if entry.name in wanted]
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
    gpu = probed["value"]
    results = None if gpu is None else Results(arguments.output, gpu, fresh=arguments.fresh)
    if arguments.dry_run:
        print("\n".join(plan(entries, results, arguments.minutes)))
        return 0
    return _build(entries) if results is None else _measure(entries, results, arguments, start)


if __name__ == "__main__":
    sys.exit(main())
