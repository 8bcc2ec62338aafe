"""Rooflines of the speed rows: operations and bytes, counted from the config, at the peaks that the run measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from qvl_model.quantization.precision import BUDGET

__all__ = ["Machine", "Work", "least_seconds", "matmul"]

# The units that can multiply a format: weights of fewer bits may be widened.
_UNITS = {"fp32": ("fma",), "bf16": ("fma", "bf16_dot", "bf16_tiles")}
_UNITS["int8"] = _UNITS["int4"] = (*_UNITS["bf16"], "int8_dot", "int8_tiles")
# Of a weight; int4 with its scales and zero-points, and with the layers that are int8 beside it.
_BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.0, "int4": BUDGET}


@dataclass(frozen=True)
class Work:
    """What one pass over a part of a model takes.

    Attributes:
        linear, attention: operations of linear layers and of the two products of attention; a multiplication and an
            addition count as two.
        weights: elements of weights, each read once. cache: elements of the KV cache that are read or written.
    """

    linear: float = 0.0
    attention: float = 0.0
    weights: float = 0.0
    cache: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        mine, theirs = asdict(self), asdict(other)
        return Work(**{key: mine[key] + theirs[key] for key in mine})


def matmul(rows: float, elements: float) -> Work:
    """``rows`` through weights of so many elements."""
    return Work(linear=2 * rows * elements, weights=elements)


@dataclass(frozen=True)
class Machine:
    """GFLOP/s (GOP/s of integers) by unit, and GB/s of reading."""

    peaks: Mapping[str, float]
    gb_s: float

    @classmethod
    def of(cls, peaks: Mapping[str, Sequence[float]], bandwidth: Mapping[str, Sequence[float]]) -> "Machine":
        """Of all that a run measured, the highest: what else runs on a shared machine only lowers them."""
        return cls({unit: max(values) for unit, values in peaks.items()}, max(map(max, bandwidth.values())))

    def peak(self, format: str) -> float:
        """Of the fastest unit that multiplies this format."""
        return max(self.peaks[unit] for unit in _UNITS[format] if unit in self.peaks)


def least_seconds(passes: Sequence[Work], machine: Machine, weights: str, dtype: str = "bf16") -> float:
    """Least seconds of passes one after the other: each takes the longer of its operations at the peak and its bytes at
    the read bandwidth.

    Args:
        weights: format of the weights: fp32, bf16, int8 or int4.
        dtype: of attention and of the KV cache.
    """
    return sum(
        max(
            work.linear / machine.peak(weights) + work.attention / machine.peak(dtype),
            (work.weights * _BITS[weights] + work.cache * _BITS[dtype]) / 8 / machine.gb_s,
        )
        / 1e9
        for work in passes
    )
