"""Runs functions in forked processes, one each, so that a crash or a hang costs one result."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import IO

__all__ = ["Task", "run_all"]

# (key, function without arguments whose value can be pickled, seconds allowed)
Task = tuple[Hashable, Callable[[], object], float]
LOG_TAIL = 1500


def _child(function: Callable[[], object], connection: Connection, log: IO[str]) -> None:
    os.setsid()  # a session of its own, so that its children end with it
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    try:
        answer = {"value": function()}
    except BaseException as error:  # any failure is this task's result
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}"}
    try:
        connection.send(answer)
    except Exception as error:  # a value that cannot be pickled
        connection.send({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)  # without the parent's exit handlers


def run_all(
    tasks: Iterable[Task], *, jobs: int = 1, tick: Callable[[], None] = lambda: None
) -> Iterator[tuple[Hashable, dict]]:
    """(key, {"value": ...} or {"error": sentence, "log": its last output}) in order of completion; at most ``jobs`` at
    a time.

    Tasks are taken from the iterable when there is room for them, and ``tick`` is called several times a second. The
    caller must have started no threads, and no CUDA, before.

    Example:
        >>> dict(run_all([("a", lambda: 1 + 1, 10.0)]))
        {'a': {'value': 2}}
    """
    context = multiprocessing.get_context("fork")
    waiting, running, more = iter(tasks), {}, True
    while more or running:
        while more and len(running) < jobs:
            task = next(waiting, None)
            if task is None:
                more = False
                break
            key, function, timeout = task
            receive, send = context.Pipe(duplex=False)
            log = tempfile.TemporaryFile("w+", errors="replace")
            process = context.Process(target=_child, args=(function, send, log), daemon=True)
            process.start()
            send.close()
            running[receive] = (key, process, log, timeout, time.monotonic() + timeout)
        if not running:
            return
        ready = multiprocessing.connection.wait(list(running), timeout=0.2)
        tick()
        now = time.monotonic()
        late = [connection for connection, item in running.items() if connection not in ready and now > item[4]]
        for connection in [*ready, *late]:
            key, process, log, timeout, _ = running.pop(connection)
            yield key, _answer(connection, process, log, timeout if connection in late else None)


def _answer(connection: Connection, process: BaseProcess, log: IO[str], late: float | None) -> dict:
    if late is not None:
        os.killpg(process.pid, signal.SIGKILL)
        answer = {"error": f"took longer than {late:.0f} s"}
    else:
        try:
            answer = connection.recv()
        except EOFError:
            process.join(5)
            answer = {"error": f"the process ended with exit code {process.exitcode}"}
    process.join(5)  # a process that hangs in a driver call cannot be killed
    if "error" in answer:
        log.seek(0)
        answer["log"] = log.read()[-LOG_TAIL:].strip()
    connection.close()
    log.close()
    return answer
