"""Virtual environments and prepared files of the other engines, all under the benchmark's cache."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkpoint_files import cache_directory
from bench.client import ROOT

__all__ = [
    "Environment",
    "EngineUnavailable",
    "Show",
    "engines_directory",
    "finished",
    "is_complete",
    "mark_complete",
    "run_step",
    "tried_once",
]

Show = Callable[[str], None]  # prints one line about what is going on
STEP_LIMIT_S = 3600


class EngineUnavailable(RuntimeError):
    """An engine cannot be measured on this machine. The message is the reason, in one line."""


def engines_directory() -> Path:
    return cache_directory() / "peers"


@contextmanager
def finished(path: Path) -> Iterator[Path]:
    """A temporary name that becomes ``path`` (file or folder) if the block succeeds, so that ``path`` is complete."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    temporary.rename(path)


def is_complete(folder: Path, recipe: object) -> bool:
    """Whether ``folder`` is complete and was made by this recipe (anything that JSON can hold)."""
    marker = folder / "complete.json"
    return marker.is_file() and marker.read_text() == json.dumps(recipe)


def mark_complete(folder: Path, recipe: object) -> None:
    (folder / "complete.json").write_text(json.dumps(recipe))


def _reason(output: str) -> str:
    """The most informative line of a failed program's output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next(
        (line for line in lines if line.startswith(("ERROR", "CMake Error")) or "error:" in line),
        lines[-1] if lines else "no output",
    )


def run_step(
    what: str, command: list[str | Path], log: Path, *, path: Path | None = None, limit_s: float = STEP_LIMIT_S
) -> None:
    """Runs one step of a preparation from the root of the checkout, its output at the end of ``log``. Raises
    EngineUnavailable if it fails.

    Args:
        what: the step, as in "<what> failed: ...".
        path: a folder that comes first in PATH.
    """
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"} if path else None
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a+", errors="replace") as output:
        output.write(f"$ {' '.join(map(str, command))}\n")
        output.flush()
        start = output.tell()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineUnavailable(f"{what} failed: {error}") from None
        try:
            code = process.wait(limit_s)
        except BaseException as error:  # timed out or interrupted: end the build with its children
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise EngineUnavailable(f"{what} took longer than {limit_s:.0f} s ({log} has its output)") from None
            raise
        output.seek(start)
        if code:
            raise EngineUnavailable(f"{what} failed: {_reason(output.read())} ({log} has the rest)")


def tried_once(prepare: Callable) -> Callable:
    """For a method ``prepare(self, show)`` that several engines call: after one failure it fails at once for the rest
    of the run.
    """
    reasons: dict[object, str] = {}

    @functools.wraps(prepare)
    def wrapped(self: Any, show: Show) -> None:
        if self in reasons:
            raise EngineUnavailable(reasons[self])
        try:
            prepare(self, show)
        except EngineUnavailable as error:
            reasons[self] = str(error)
            raise

    return wrapped


@dataclass(frozen=True)
class Environment:
    """A virtual environment, made again if it is not complete.

    Attributes:
        folder: its path; the log is beside it.
        steps: arguments of pip, one call after another.
        check: a Python statement that must run in it.
    """

    folder: Path
    steps: tuple[tuple[str, ...], ...]
    check: str

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def _recipe(self) -> list:
        return [sys.version, self.steps, self.check]

    @property
    def ready(self) -> bool:
        return is_complete(self.folder, self._recipe)

    @tried_once
    def prepare(self, show: Show) -> None:
        if self.ready:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        show(f"creating {self.folder}")
        run_step("creating a virtual environment", [sys.executable, "-m", "venv", self.folder], self.log)
        for step in self.steps:
            show(f"pip {' '.join(step)}")
            run_step(f"pip {' '.join(step)}", [self.python, "-m", "pip", *step], self.log)
        run_step(f"{self.check!r} in {self.folder}", [self.python, "-c", self.check], self.log)
        mark_complete(self.folder, self._recipe)
