"""Kernel benchmark: every op over the model shapes of its shared cases, beside its reference and its roofline.

    python -m bench.kernels [-k EXPRESSION] [any pytest-benchmark option]
    QVL_BENCH_DTYPE=fp32 python -m bench.kernels        (default bf16; or fp16)

The roofline time is the longer of bytes at the read bandwidth and FLOPs at the rate of the fastest GEMM measured here
(ours or PyTorch's, in any dtype). Outputs that stay in cache can beat it. The result is compared with the reference
before it is timed.
"""

import functools
import importlib
import inspect
import itertools
import math
import os
import sys
from typing import Any

import pytest
import torch

import qvl_kernels
from bench.session import DTYPES
from bench.timing import seconds
from qvl_kernels.dispatch import extension
from qvl_kernels.testing import Case, relative_error

__all__ = ["Roofline", "cases_of", "main", "ops"]

DTYPE = DTYPES[os.environ.get("QVL_BENCH_DTYPE", "bf16")]
SECONDS = 0.4  # of timing per function
COLD_BYTES = 128 << 20  # total size of the copies that inputs rotate over, so that they come from memory as in a model
MAX_COPIES = 32


def ops() -> dict[str, object]:
    """Public functions of qvl_kernels that are ops, by name."""
    named = {name: getattr(qvl_kernels, name) for name in qvl_kernels.__all__}
    return {
        name: value
        for name, value in named.items()
        if inspect.isfunction(value) and value.__module__.startswith("qvl_kernels.ops.")
    }


def cases_of(op: str) -> list[Case]:
    """The cases of one op; folders with two ops keep one list for each."""
    module = importlib.import_module(getattr(qvl_kernels, op).__module__.rpartition(".")[0] + ".cases")
    lists = {"add_": "ADD_CASES", "vision_rope": "VISION_CASES"}
    return getattr(module, next((name for prefix, name in lists.items() if op.startswith(prefix)), "CASES"))


class Roofline:
    """Roofline of this machine, measured once: GB/s of reading, GFLOP/s of the fastest GEMM."""

    @functools.cached_property
    def gb_s(self) -> float:
        return extension().read_bandwidth(1 << 30, 3)

    @functools.cached_property
    def gflop_s(self) -> float:
        rows, n, k = 512, 6144, 2048
        best = float("inf")
        for dtype in DTYPES.values():
            x, weight = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
            for linear in (qvl_kernels.linear, torch.nn.functional.linear):
                best = min(best, *(seconds(lambda: linear(x, weight)) for _ in range(4)))
        return 2 * rows * n * k / best / 1e9

    def of(self, case: Case) -> float:
        return max(case.bytes(DTYPE.itemsize) / self.gb_s, case.flops / self.gflop_s) / 1e9


ROOFLINE = Roofline()
MODEL_CASES = [pytest.param(op, case, id=f"{op}-{case.name}") for op in ops() for case in cases_of(op) if case.model]


def _check(op: str, case: Case) -> None:
    """The op against its reference; both may differ by the rounding of DTYPE."""

    def first(backend: str) -> torch.Tensor:
        with qvl_kernels.use_backend(backend):
            result = getattr(qvl_kernels, op)(**case.make(DTYPE, torch.Generator().manual_seed(0)))
        return result[0] if isinstance(result, tuple) else result

    error = relative_error(first("cpp"), first("reference"))
    assert error < 16 * torch.finfo(DTYPE).eps, f"{op} {case.name}: relative difference {error:.2e} to the reference"


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("op", "case"), MODEL_CASES)
def test_speed(op: str, case: Case, backend: str, benchmark: Any) -> None:
    if backend == "cpp":
        _check(op, case)
    copies = min(MAX_COPIES, max(1, math.ceil(COLD_BYTES / max(1.0, case.bytes(DTYPE.itemsize)))))
    inputs = itertools.cycle([case.make(DTYPE, torch.Generator().manual_seed(seed)) for seed in range(copies)])
    function = getattr(qvl_kernels, op)
    benchmark.extra_info.update(
        op=op,
        case=case.name,
        backend=backend,
        roofline=ROOFLINE.of(case),
        bytes=case.bytes(DTYPE.itemsize),
        flops=case.flops,
    )
    with torch.inference_mode(), qvl_kernels.use_backend(backend):
        function(**next(inputs))
        once = seconds(lambda: function(**next(inputs)))
        iterations = max(1, int(1e-3 / once))  # a round takes at least a millisecond, for the clock's resolution
        rounds = min(200, max(3, int(SECONDS / (once * iterations))))
        benchmark.pedantic(lambda: function(**next(inputs)), iterations=iterations, rounds=rounds, warmup_rounds=1)


class _Summary:
    """A pytest plugin that prints one line per case instead of pytest-benchmark's table."""

    def pytest_terminal_summary(self, terminalreporter: Any, config: Any) -> None:
        from rich.console import Console
        from rich.table import Table

        rows: dict = {}
        for bench in config._benchmarksession.benchmarks:
            info = bench.extra_info
            rows.setdefault((info["op"], info["case"]), {"info": info})[info["backend"]] = bench.stats
        table = Table(
            "op",
            "case",
            "median",
            "fastest",
            "roofline",
            "of roofline",
            "reference",
            "ratio",
            "GB/s",
            "GFLOP/s",
            title=f"{DTYPE}: {ROOFLINE.gb_s:.1f} GB/s, {ROOFLINE.gflop_s:.0f} GFLOP/s, "
            f"{torch.get_num_threads()} threads, {qvl_kernels.cpu_info()['isa']}",
        )
        for (op, case), row in rows.items():
            if "cpp" not in row or "reference" not in row:
                continue
            ours, reference, info = row["cpp"].median, row["reference"].median, row["info"]
            table.add_row(
                op,
                case,
                _time(ours),
                _time(row["cpp"].min),
                _time(info["roofline"]),
                f"{info['roofline'] / ours:.0%}",
                _time(reference),
                f"{reference / ours:.2f}×",
                f"{info['bytes'] / ours / 1e9:.1f}",
                f"{info['flops'] / ours / 1e9:.0f}",
            )
        Console(width=None if sys.stdout.isatty() else 150).print(table)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def main(argv: list[str]) -> int:
    """Runs this file under pytest-benchmark with further ``argv``."""
    options = [__file__, "-q", "--benchmark-disable-gc", "--benchmark-quiet", "-p", "no:cacheprovider"]
    return int(pytest.main([*options, *argv], plugins=[_Summary()]))


if __name__ == "__main__":
    from bench import kernels  # the module that pytest imports, so that the roofline is measured once

    sys.exit(kernels.main(sys.argv[1:]))
