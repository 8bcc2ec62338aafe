"""The GPU tests in several processes, since most of their time is compilation; the outcome of each test is kept."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from bench.gpu import outcomes

__all__ = ["GRACE_SECONDS", "build", "merged", "run"]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400.0
GRACE_SECONDS = 15.0  # for the running test to end after the interrupt
# Exit statuses of pytest that are no crash: passed, failed, interrupted, no tests; and interrupted while it started.
ENDED = (0, 1, 2, 5, -signal.SIGINT)


class _Pytest:
    """pytest in a process of its own."""

    def __init__(self, root: Path, *arguments: str, file: Path | None = None) -> None:
        plugin = ("-p", "bench.gpu.outcomes") if file is not None else ()
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *plugin, *arguments]
        self._output, self.killed = tempfile.TemporaryFile("w+"), False
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, outcomes.FILE: str(file)}
        self.process = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def stop_at(self, deadline: float) -> None:
        """Interrupts pytest at the deadline."""
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
        with self._output as file:
            file.seek(0)
            return file.read()


def run(
    folder: str = "tests/gpu",
    root: Path = ROOT,
    *,
    part: tuple[int, int] = (1, 1),
    done: Collection[str] = (),
    jobs: int | None = None,
    seconds: float = SECONDS,
) -> dict:
    """Runs the GPU tests of one part of several. {"outcomes": {test: "passed", "failed" or "skipped"}, "failures":
    {test: the end of its traceback}, "tests": all there are, "crashed": ends of what processes printed}.

    Args:
        part: (I, N): every N-th test of a shuffled list, from the I-th on; slow ones stand together in the files.
        done: tests that are left out, since they passed before.
    """
    deadline = time.monotonic() + seconds
    collected = _Pytest(root, "--collect-only", folder)
    collected.stop_at(deadline)
    listed = collected.output(deadline + GRACE_SECONDS)
    tests = [line for line in listed.splitlines() if "::" in line]
    if not tests:
        raise RuntimeError(f"no tests were found in {folder}: {listed[-500:].strip()}")
    random.Random(0).shuffle(tests)
    chosen = [test for test in tests[part[0] - 1 :: part[1]] if test not in done]
    jobs = min(jobs or len(os.sched_getaffinity(0)), max(1, len(chosen)))
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "outcomes")
        running = [_Pytest(root, *chosen[i::jobs], file=file) for i in range(jobs)] if chosen else []
        for one in running:
            one.stop_at(deadline)
        printed = [one.output(deadline + GRACE_SECONDS) for one in running]
        lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines]
    crashed = [
        text[-300:]
        for one, text in zip(running, printed, strict=True)
        if one.process.returncode not in ENDED and not one.killed
    ]
    return {
        "outcomes": {one["test"]: one["outcome"] for one in found},
        "failures": {one["test"]: one["reason"] for one in found if one["outcome"] == "failed"},
        "tests": len(tests),
        "crashed": crashed,
    }


def merged(before: dict | None, now: dict) -> dict:
    """Outcomes of two runs; the later one of a test counts. With numbers: passed, failed, skipped and not run."""
    before = before or {}
    found = {**before.get("outcomes", {}), **now["outcomes"]}
    failures = {
        test: reason
        for test, reason in {**before.get("failures", {}), **now["failures"]}.items()
        if found[test] == "failed"
    }
    counts = {word: sum(outcome == word for outcome in found.values()) for word in ("passed", "failed", "skipped")}
    not_run = max(0, now["tests"] - len(found))
    return {**counts, "not_run": not_run, **now, "outcomes": found, "failures": failures}


def build() -> dict:
    """Without a GPU: whether the test files compile."""
    files = sorted((ROOT / "tests" / "gpu").glob("*.py"))
    for file in files:
        compile(file.read_text(), str(file), "exec")
    return {"files": [file.name for file in files]}
