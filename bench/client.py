"""The driver's side of a worker process: start it, ask it, stop it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["Worker", "WorkerError"]

ROOT = Path(__file__).resolve().parent.parent


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the message carries its traceback or its last output."""


class Worker:
    """A fresh process that measures. ``environment`` adds variables, for example to force an instruction set.

    ``command`` starts it, from the root of the checkout: ``python -m bench.worker`` if left out, or another
    engine's worker.

    Example:
        >>> with Worker("probe") as probe:
        ...     probe.ask("bandwidth", bytes=1 << 30, repeats=3)
    """

    def __init__(self, name: str, environment: dict[str, str] | None = None, command: list[str] | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command or [sys.executable, "-m", "bench.worker"],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Runs one operation in the worker and returns its value. Raises WorkerError if it failed or the
        worker died.
        """
        try:
            self._process.stdin.write(json.dumps({"operation": operation, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise WorkerError(
                f"the {self.name} worker ended with exit code {code} during {operation!r} "
                f"(-9 usually means that memory ran out)\n{self._tail()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{operation!r} failed in the {self.name} worker:\n{answer['error']}")
        return answer["value"]

    def _tail(self) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-20:])

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.stdin.close()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
