"""Times and memory on a GPU; on other devices the same with the wall clock, so that every case can be tried without
one.
"""

import time
from collections.abc import Callable

import torch

from bench.timing import median, summary

__all__ = ["compare", "peak_bytes", "synchronize", "wall_seconds"]

# Larger than any L2 cache: inputs come from memory, as in a model.
FLUSH_BYTES = 1 << 30
FLUSH_BYTES_CPU = 1 << 20
MARGIN = 2.0  # of a sleep over the launch that it covers
MOST_HERTZ = 2.2e9  # of the clock that sleeps are counted in: no GPU's is faster


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, device work included."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def compare(
    functions: dict[str, Callable[[], object]], device: torch.device, *, seconds: float = 0.4, most: int = 50
) -> dict[str, dict]:
    """Milliseconds of each function: medians and ranges of interleaved rounds, each call after a flush of the L2 cache.
    "host_us" is the median time in microseconds that the host needed to launch it.

    On a GPU the device sleeps before each call for longer than the host needs to launch it, so device time is measured.
    ``seconds`` bounds the time of all rounds together, ``most`` their number; five are always done.
    """
    for function in functions.values():
        for _ in range(2):
            function()
    once = sum(wall_seconds(function, device) for function in functions.values())
    cycles = {name: _sleep_cycles(function, device) for name, function in functions.items()}
    rounds = min(most, max(5, int(seconds / max(once, 1e-6))))
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else FLUSH_BYTES_CPU, dtype=torch.uint8, device=device)
    names, times, host = list(functions), {name: [] for name in functions}, {name: [] for name in functions}
    for index in range(rounds):
        order = names[index % len(names) :] + names[: index % len(names)]
        for name in order:
            flush.zero_()
            if cycles[name]:
                torch.cuda._sleep(cycles[name])
            reading, launched = _once(functions[name], device)
            times[name].append(reading)
            host[name].append(launched)
    synchronize(device)
    return {
        name: {**summary([reading() for reading in readings]), "host_us": round(1e6 * median(host[name]), 1)}
        for name, readings in times.items()
    }


def _sleep_cycles(function: Callable[[], object], device: torch.device) -> int:
    """Clock cycles of the device that outlast the launch of a call."""
    if device.type != "cuda":
        return 0
    synchronize(device)
    start = time.perf_counter()
    function()
    launched = time.perf_counter() - start
    synchronize(device)
    return int(MARGIN * launched * MOST_HERTZ)


def _once(function: Callable[[], object], device: torch.device) -> tuple[Callable[[], float], float]:
    """Runs it; how to read its milliseconds once the device has finished, and the seconds that the host needed."""
    if device.type != "cuda":
        elapsed = wall_seconds(function, device)
        return lambda: 1e3 * elapsed, elapsed
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    begun = time.perf_counter()
    function()
    launched = time.perf_counter() - begun
    end.record()
    return lambda: start.elapsed_time(end), launched


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Device memory that a call needs beyond what was allocated before; 0 where there is no allocator to ask."""
    if device.type != "cuda":
        function()
        return 0
    function()  # workspaces that it keeps are not counted
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
