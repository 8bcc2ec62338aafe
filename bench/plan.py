"""The order of measurements: which workers live when, and which requests they get in turn."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import metrics
from bench.client import Worker

__all__ = ["AVX2", "Options", "run", "steps"]

# An AVX2 machine, simulated: our kernels, PyTorch's own and oneDNN's.
AVX2 = {"QVL_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
PROBE_BYTES = 1 << 30  # far larger than any cache


@dataclass(frozen=True)
class Options:
    """What to measure. The sizes are those of the targets; tests take smaller ones."""

    model: str
    rounds: int = 4
    tokens: int = 33
    image_size: int = 448
    long_size: int = 1024
    text_tokens: int = 66
    long_pairs: int = 1
    layers: int = 4
    probe_bytes: int = PROBE_BYTES
    accuracy: bool = True
    accuracy_limit: int | None = None
    accuracy_model: str | None = None
    all: bool = False


def _ask_in_turn(stock: Worker, ours: Worker, index: int, operation: str, **arguments) -> dict:
    """The same request to both, one right after the other; who comes first changes with ``index``."""
    order = [("stock", stock), ("ours", ours)]
    return {who: worker.ask(operation, **arguments) for who, worker in (order if index % 2 == 0 else order[::-1])}


def _append(times: dict, name: str, pair: dict) -> None:
    for who, value in pair.items():
        times.setdefault(name, {"stock": [], "ours": []})[who].append(value)


def _rounds(stock: Worker, ours: Worker, options: Options, step: Callable[[str], None], label: str,
            between: Callable[[], None] = lambda: None) -> dict:
    """Times of the single-image row and of text prefill: {"vision": {"stock": [...], "ours": [...]}, ...}."""
    times: dict = {}
    for index in range(options.rounds):
        step(f"{label}: round {index + 1} of {options.rounds}")
        between()
        _append(times, "vision", _ask_in_turn(stock, ours, index, "vision"))
        pair = _ask_in_turn(stock, ours, index, "generate", prompt="image", tokens=options.tokens)
        _append(times, "ttft", {who: value["first"] for who, value in pair.items()})
        _append(times, "decode", {who: value["per_token"] for who, value in pair.items()})
        pair = _ask_in_turn(stock, ours, index, "generate", prompt="text", tokens=1)
        _append(times, "prefill", {who: value["first"] for who, value in pair.items()})
    return times


def _load(worker: Worker, options: Options, accelerated: bool, dtype: str) -> dict:
    return worker.ask("load", path=options.model, accelerated=accelerated, dtype=dtype, image_size=options.image_size,
                      long_size=options.long_size, text_tokens=options.text_tokens)


def _main_phase(options: Options, probe: Worker, folder: Path, step: Callable[[str], None]) -> dict:
    """Stock bf16 against accelerated bf16: times, memory, logits."""
    raw: dict = {"bandwidth": []}

    def measure_bandwidth() -> None:
        raw["bandwidth"].append(probe.ask("bandwidth", bytes=options.probe_bytes, repeats=3))

    with Worker("stock bf16") as stock, Worker("accelerated bf16") as ours:
        step("loading stock and accelerated")
        raw["sizes"] = _load(stock, options, accelerated=False, dtype="bf16")
        _load(ours, options, accelerated=True, dtype="bf16")
        step("warming up")
        _ask_in_turn(stock, ours, 0, "warm_up")
        raw["times"] = _rounds(stock, ours, options, step, "bf16", measure_bandwidth)
        raw["peak_rss"] = _ask_in_turn(stock, ours, 0, "peak_rss")
        for who, worker in (("stock", stock), ("ours", ours)):
            worker.ask("logits", file=str(folder / f"{who}.npy"))
        for index in range(options.long_pairs):
            step(f"two large images: pair {index + 1} of {options.long_pairs}")
            pair = _ask_in_turn(stock, ours, index, "generate", prompt="long", tokens=1)
            _append(raw["times"], "ttft_long", {who: value["first"] for who, value in pair.items()})
        raw["peak_rss_long"] = _ask_in_turn(stock, ours, 0, "peak_rss")
        raw["fallbacks"] = ours.ask("fallbacks")
    measure_bandwidth()
    return raw


def _full_model_errors(options: Options, folder: Path) -> dict[str, float]:
    """Errors of the bf16 logits against stock's in fp32, the same weights."""
    with Worker("fp32 truth") as worker:
        _load(worker, options, accelerated=False, dtype="fp32")
        worker.ask("logits", file=str(folder / "truth.npy"))
    truth = np.load(folder / "truth.npy")
    norm = np.linalg.norm(truth.astype(np.float64))
    return {who: float(np.linalg.norm(np.load(folder / f"{who}.npy").astype(np.float64) - truth) / norm) for who in ("stock", "ours")}


def _other_dtypes(options: Options, step: Callable[[str], None], dtypes: tuple[str, ...], label: str,
                  environment: dict[str, str]) -> dict[str, dict]:
    """Times of accelerated bf16 against stock in each of ``dtypes``."""
    times = {}
    with Worker(f"accelerated bf16 {label}", environment) as ours:
        _load(ours, options, accelerated=True, dtype="bf16")
        ours.ask("warm_up")
        for dtype in dtypes:
            with Worker(f"stock {dtype} {label}", environment) as stock:
                step(f"loading stock {dtype} {label}")
                _load(stock, options, accelerated=False, dtype=dtype)
                stock.ask("warm_up")
                times[dtype] = _rounds(stock, ours, options, step, f"stock {dtype} {label}")
    return times


def steps(options: Options) -> int:
    """How many times ``run`` calls ``step``."""
    count = 1 + 2 + options.rounds + options.long_pairs + 3 + options.accuracy
    return count + (4 * (options.rounds + 1) if options.all else 0)


def run(options: Options, step: Callable[[str], None]) -> dict[str, object]:
    """Measures everything and returns the result: machine, raw numbers, metrics (see metrics.py), accuracy."""
    with Worker("probe") as probe, tempfile.TemporaryDirectory(prefix="qvl-bench-") as name:
        step("reading the machine")
        machine, cpu = probe.ask("machine"), probe.ask("cpu_info")
        folder = Path(name)
        raw = _main_phase(options, probe, folder, step)
        step("error of the full model against fp32")
        raw["errors"] = {"bf16_full": _full_model_errors(options, folder)}
    with Worker("truth") as worker:
        step(f"error of {options.layers} layers against float64")
        errors = worker.ask("errors", path=options.model, layers=options.layers, image_size=options.image_size,
                            text_tokens=options.text_tokens)
        raw["errors"] |= {f"{dtype}_float64": pair for dtype, pair in errors.items()}
        step("greedy tokens of odd configs")
        raw["greedy"] = worker.ask("greedy")
    if options.all:
        raw["other_dtypes"] = _other_dtypes(options, step, ("fp16", "fp32"), "", {})
        raw["avx2"] = _other_dtypes(options, step, ("bf16", "fp32"), "limited to AVX2", AVX2)
    accuracy = None
    if options.accuracy:
        step("accuracy of the trained digits model")
        with Worker("accuracy") as worker:
            accuracy = worker.ask("accuracy", model=options.accuracy_model, limit=options.accuracy_limit)
    sizes = raw.pop("sizes")
    return {"machine": machine, "cpu_info": cpu, "sizes": sizes, "metrics": metrics.from_raw(raw, sizes), "accuracy": accuracy, "raw": raw}
