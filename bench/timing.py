"""Statistics of repeated measurements: medians, spread, and ratios of pairs taken one right after the other."""

import statistics
import time
from collections.abc import Callable

__all__ = ["median", "paired_ratio", "seconds", "summary"]


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return statistics.median(values)


def summary(values: list[float]) -> dict[str, object]:
    """Median and range beside the values themselves, so that a result file can be judged later."""
    return {"median": median(values), "low": min(values), "high": max(values), "values": values}


def paired_ratio(stock: list[float], ours: list[float]) -> dict[str, float]:
    """Speed-up of ``ours``, pair by pair: noise that lasts longer than a pair cancels.

    Example:
        >>> paired_ratio([8.0, 9.0, 8.0], [4.0, 4.5, 5.0])["median"]
        2.0
    """
    if len(stock) != len(ours) or not stock:
        raise ValueError(f"need as many stock as accelerated times, at least one; got {len(stock)} and {len(ours)}")
    ratios = [s / o for s, o in zip(stock, ours)]
    return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
