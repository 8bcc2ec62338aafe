"""Mutation testing: applies each fault of ``mutations.py`` to a copy of the tree and runs the tests that must fail:
``make mutate``.

Fails if the tests of a fault pass with it, or fail without any fault; prints a table.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds for the tests of one mutation
TIMEOUT_OF_ALL = 1800  # seconds for the tests of all of them
PASSED, FAILED = 0, 1  # exit status of pytest; all others mean that no test ran


def copied(target: Path) -> Path:
    """The tree with its built extension, without environments and caches."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info"))
    return target


def mutated(text: str, mutation: Mutation) -> str:
    """Raises: ValueError if the expression is not there exactly once."""
    found = text.count(mutation.old)
    if found != 1:
        raise ValueError(
            f"{mutation.file} has {mutation.old!r} {found} times; a mutation names an expression that stands there once"
        )
    return text.replace(mutation.old, mutation.new)


def run_tests(tree: Path, tests: list[str], timeout: int = TIMEOUT) -> tuple[int | None, str]:
    """Exit status of pytest (None: timeout) and the end of its output."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, f"not done in {timeout} s"
    return done.returncode, (done.stdout + done.stderr)[-3000:]


def verdict(status: int | None) -> str:
    """The verdict that the exit status of a fault's tests gives."""
    return {FAILED: "seen", PASSED: "SURVIVED", None: "TIME OUT"}.get(status, "NO TESTS RAN")


def main(mutations: list[Mutation] = MUTATIONS, options: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose file or expression has this in it")
    parser.add_argument("--jobs", type=int, default=max(1, min(4, os.cpu_count() or 1)))
    arguments = parser.parse_args(options)
    chosen = [
        mutation for mutation in mutations if arguments.only in f"{mutation.file} {mutation.old} -> {mutation.new}"
    ]
    for mutation in chosen:
        mutated((ROOT / mutation.file).read_text(), mutation)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qvl-mutate-") as directory, ThreadPoolExecutor(arguments.jobs) as pool:
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(arguments.jobs):
            trees.put(copied(Path(directory) / str(i)))

        def check(mutation: Mutation | None) -> tuple[str, str]:
            """The verdict on a mutation, or with None on all their tests without one; and what pytest printed."""
            tree = trees.get()
            try:
                if mutation is None:
                    tests = sorted({test for other in chosen for test in other.tests.split("\n")})
                    status, output = run_tests(tree, tests, TIMEOUT_OF_ALL)
                    return ("pass" if status == PASSED else "FAIL WITHOUT A FAULT"), output
                file = tree / mutation.file
                text = file.read_text()
                file.write_text(mutated(text, mutation))
                try:
                    status, output = run_tests(tree, mutation.tests.split("\n"))
                finally:
                    file.write_text(text)
                return verdict(status), output
            finally:
                trees.put(tree)

        wrong = []
        for mutation, (word, output) in zip([None, *chosen], pool.map(check, [None, *chosen])):
            name = (
                "all tests without a fault"
                if mutation is None
                else f"{mutation.file}: {mutation.old.strip()} -> {mutation.new.strip()}"
            )
            print(f"{word:12} {' '.join(name.split())}", flush=True)
            if word not in ("seen", "pass"):
                wrong.append(f"\n{name}: {word}\n{output}")
    print(f"{len(chosen)} mutations, {len(wrong)} wrong, in {time.monotonic() - start:.0f} s", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
