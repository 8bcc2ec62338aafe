"""The order of measurements: which workers run when, and which requests are interleaved."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import metrics
from bench.client import Worker, WorkerError
from bench.engines import engines_of, prepared
from bench.families import FAMILIES, Family

__all__ = ["AVX2", "Options", "run", "steps"]

# An AVX2 machine, simulated: our kernels, PyTorch's own and oneDNN's.
AVX2 = {"QVL_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
QUANTIZED = ("int8", "int4")
MATCHING = {
    "bf16": "ours",
    "Q8_0": "int8",
    "Q4_0": "int4",
    "int8": "int8",
    "int4": "int4",
}  # formats of other engines, and ours of the same size
PROBE_BYTES = 1 << 30  # far larger than any cache
PEAK_REPEATS = 100  # of loops of a millisecond or less
ROW_SECONDS = 300  # after which a row gets no further round: on some processors stock takes minutes for one


@dataclass(frozen=True)
class Options:
    """What to measure. The sizes are those of the targets; tests take smaller ones.

    ``packed``: int8 and int4 weights too, and a batch of ``batch`` prompts. ``peers``: other engines too
    (bench/engines). ``all``: stock in other dtypes and on an AVX2 machine too.
    """

    model: str
    family: str = "qwen3-vl"
    rounds: int = 4
    tokens: int = 33
    image_size: int = 448
    long_size: int = 1024
    text_tokens: int = 66
    long_pairs: int = 1
    layers: int = 4
    batch: int = 8
    probe_bytes: int = PROBE_BYTES
    accuracy: bool = True
    accuracy_limit: int | None = None
    all: bool = False
    packed: bool = False
    peers: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        """The interleaved variants: "stock" and keys of ``session.ACCELERATED``, "ours" (accelerated, weights as
        stored) among them.
        """
        return ("stock", "ours", *(QUANTIZED if self.packed else ()))


Workers = dict[str, Worker]  # by variant


def _interleaved(workers: Workers, index: int) -> list[str]:
    """The variants in this round's order; the first one changes with ``index``."""
    return list(workers)[:: 1 if index % 2 == 0 else -1]


def _ask_interleaved(workers: Workers, index: int, operation: str, **arguments: Any) -> dict:
    """Sends the same request to all variants, one after the other."""
    return {variant: workers[variant].ask(operation, **arguments) for variant in _interleaved(workers, index)}


def _rounds_in_time(count: int) -> Iterator[int]:
    """The indices of ``count`` rounds, or of fewer, at least 1, once they have taken ``ROW_SECONDS``."""
    begin = time.monotonic()
    for index in range(count):
        if index and time.monotonic() - begin > ROW_SECONDS:
            return
        yield index


def _append(times: dict, name: str, answers: dict) -> None:
    for variant, value in answers.items():
        times.setdefault(name, {}).setdefault(variant, []).append(value)


def _rounds(
    workers: Workers,
    options: Options,
    step: Callable[[str], None],
    label: str,
    probe: Worker,
    read_bandwidth: Callable[[], float] | None = None,
) -> dict:
    """Times of the single-image row and of text prefill: {"vision": {"stock": [...], "ours": [...]}, ...}. "bandwidth":
    mean GB/s read right before and right after each variant's decode: memory bandwidth of a shared machine changes
    within minutes. "peaks": GFLOP/s of each unit, as ``probe`` reaches them at the beginning of each round.
    """
    times: dict = {}
    for index in _rounds_in_time(options.rounds):
        step(f"{label}: round {index + 1} of {options.rounds}")
        _append(times, "peaks", probe.ask("unit_peaks", repeats=PEAK_REPEATS))
        _append(times, "vision", _ask_interleaved(workers, index, "vision"))
        answers, bandwidth = {}, {}
        before = read_bandwidth() if read_bandwidth else None
        for variant in _interleaved(workers, index):
            answers[variant] = workers[variant].ask("generate", prompt="image", tokens=options.tokens)
            if read_bandwidth:
                after = read_bandwidth()
                bandwidth[variant], before = (before + after) / 2, after
        _append(times, "bandwidth", bandwidth)
        _append(times, "ttft", {variant: answer["first"] for variant, answer in answers.items()})
        _append(times, "decode", {variant: answer["per_token"] for variant, answer in answers.items()})
        answers = _ask_interleaved(workers, index, "generate", prompt="text", tokens=1)
        _append(times, "prefill", {variant: answer["first"] for variant, answer in answers.items()})
    return times


def _load(worker: Worker, options: Options, variant: str, dtype: str) -> dict:
    return worker.ask(
        "load",
        path=options.model,
        variant=variant,
        dtype=dtype,
        image_size=options.image_size,
        long_size=options.long_size,
        text_tokens=options.text_tokens,
        batch=options.batch,
    )


def _main_phase(options: Options, probe: Worker, folder: Path, step: Callable[[str], None]) -> dict:
    """All variants in bf16: times, memory, logits."""
    raw: dict = {}

    def read_bandwidth() -> float:
        return probe.ask("bandwidth", bytes=options.probe_bytes, repeats=3)

    with ExitStack() as stack:
        workers = {variant: stack.enter_context(Worker(f"{variant} bf16")) for variant in options.variants}
        step(f"loading {', '.join(workers)}")
        loaded = {variant: _load(worker, options, variant, "bf16") for variant, worker in workers.items()}
        raw["bytes_per_token"] = {variant: sizes.pop("bytes_per_token") for variant, sizes in loaded.items()}
        raw["sizes"], raw["batch"] = loaded["stock"], options.batch
        step("warming up")
        _ask_interleaved(workers, 0, "warm_up")
        raw["times"] = _rounds(workers, options, step, "bf16", probe, read_bandwidth)
        raw["bandwidth"], raw["peaks"] = raw["times"].pop("bandwidth"), raw["times"].pop("peaks")
        raw["work"] = workers["stock"].ask("work", tokens=options.tokens)
        raw["peak_rss"] = _ask_interleaved(workers, 0, "peak_rss")
        for variant, worker in workers.items():
            worker.ask("logits", file=str(folder / f"{variant}.npy"))
        for index in _rounds_in_time(options.rounds if options.packed else 0):
            step(f"batch of {options.batch}: round {index + 1} of {options.rounds}")
            answers = _ask_interleaved(workers, index, "generate", prompt="batch", tokens=options.tokens)
            _append(raw["times"], "batch", {variant: answer["per_token"] for variant, answer in answers.items()})
        for index in _rounds_in_time(options.long_pairs):
            step(f"two large images: pair {index + 1} of {options.long_pairs}")
            answers = _ask_interleaved(workers, index, "generate", prompt="long", tokens=1)
            _append(raw["times"], "ttft_long", {variant: answer["first"] for variant, answer in answers.items()})
        raw["peak_rss_long"] = _ask_interleaved(workers, 0, "peak_rss")
        raw["fallbacks"] = workers["ours"].ask("fallbacks")
        raw["routes"] = {variant: workers[variant].ask("kernels") for variant in options.variants[1:]}
    return raw


def _full_model_errors(options: Options, folder: Path) -> dict[str, float]:
    """Errors of the logits of each variant against stock's in fp32, the same weights."""
    with Worker("fp32 reference") as worker:
        _load(worker, options, "stock", "fp32")
        worker.ask("logits", file=str(folder / "golden.npy"))
    golden = np.load(folder / "golden.npy").astype(np.float64)
    return {
        variant: float(np.linalg.norm(np.load(folder / f"{variant}.npy") - golden) / np.linalg.norm(golden))
        for variant in options.variants
    }


def _other_dtypes(
    options: Options, step: Callable[[str], None], dtypes: tuple[str, ...], label: str, environment: dict[str, str]
) -> dict[str, dict]:
    """Times of accelerated bf16 against stock in each of ``dtypes``."""
    times = {}
    with Worker(f"accelerated bf16 {label}", environment) as ours:
        _load(ours, options, "ours", "bf16")
        ours.ask("warm_up")
        for dtype in dtypes:
            with Worker(f"stock {dtype} {label}", environment) as stock:
                step(f"loading stock {dtype} {label}")
                _load(stock, options, "stock", dtype)
                stock.ask("warm_up")
                workers = {"stock": stock, "ours": ours}
                times[dtype] = _rounds(workers, options, step, f"stock {dtype} {label}", ours)
    return times


def _other_engines(options: Options, folder: Path, step: Callable[[str], None]) -> dict:
    """Times of each other engine, interleaved with ours at the same weight size and with int8: {"times": by engine,
    "skipped": reasons, "versions"}.
    """
    ready, skipped = prepared(engines_of(Path(options.model)), lambda text: None)
    times: dict = {}
    with ExitStack() as stack:
        ours = {variant: stack.enter_context(Worker(f"{variant} bf16")) for variant in ("ours", *QUANTIZED)}
        step(f"loading {', '.join(ours)}")
        for variant, worker in ours.items():
            threads = _load(worker, options, variant, "bf16")["threads"]
            worker.ask("warm_up")
        prompts = folder / "prompts.safetensors"
        ours["ours"].ask("save_prompts", file=str(prompts))
        for engine in ready:
            step(f"peer {engine.name}")
            variant = MATCHING[engine.name.split()[-1]]
            try:
                with engine.start(prompts, threads) as worker:
                    worker.ask("warm_up")
                    workers = {"peer": worker, "int8": ours["int8"], variant: ours[variant]}
                    times[engine.name] = _engine_rounds(workers, options, "image" in engine.prompts)
            except WorkerError as error:  # usually the other engine's fault: ours has just run without it
                skipped[engine.name] = str(error).strip().splitlines()[-1]
    return {"times": times, "skipped": skipped, "versions": {engine.name: engine.version for engine in ready}}


def _engine_rounds(workers: Workers, options: Options, images: bool) -> dict:
    times: dict = {}
    for index in range(options.rounds):
        answers = _ask_interleaved(workers, index, "generate", prompt="text", tokens=options.tokens)
        _append(times, "prefill", {who: answer["first"] for who, answer in answers.items()})
        _append(times, "decode", {who: answer["per_token"] for who, answer in answers.items()})
        if images:
            answers = _ask_interleaved(workers, index, "generate", prompt="image", tokens=1)
            _append(times, "ttft", {who: answer["first"] for who, answer in answers.items()})
    return times


def steps(options: Options) -> int:
    """How many times ``run`` calls ``step`` at most: engines that cannot be prepared are left out."""
    count = 1 + 2 + options.rounds * (1 + options.packed) + options.long_pairs + 3 + options.packed + options.accuracy
    count += 1 + len(engines_of(Path(options.model))) if options.peers else 0
    return count + (4 * (options.rounds + 1) if options.all else 0)


def run(options: Options, step: Callable[[str], None]) -> dict[str, object]:
    """Measures everything and returns the result: machine, raw numbers, metrics (see metrics.py), accuracy."""
    family: Family = FAMILIES[options.family]
    with Worker("probe") as probe, tempfile.TemporaryDirectory(prefix="qvl-bench-") as name:
        step("reading the machine")
        machine, cpu = probe.ask("machine"), probe.ask("cpu_info")
        folder = Path(name)
        raw = _main_phase(options, probe, folder, step)
        step("error of the full model against fp32")
        raw["errors"] = {"bf16_full": _full_model_errors(options, folder)}
        if options.peers:
            raw["peers"] = _other_engines(options, folder, step)
    with Worker("reference") as worker:
        step(f"error of {options.layers} layers against float64")
        errors = worker.ask(
            "errors",
            path=options.model,
            layers=options.layers,
            image_size=options.image_size,
            text_tokens=options.text_tokens,
        )
        raw["errors"] |= {f"{dtype}_float64": pair for dtype, pair in errors.items()}
        if options.packed:
            step("layers of quantised weights against the same rounded numbers")
            raw["layer_cosines"] = worker.ask(
                "cosines",
                path=options.model,
                weights=QUANTIZED,
                layers=options.layers,
                image_size=options.image_size,
                text_tokens=options.text_tokens,
            )
        step("greedy tokens of odd configs")
        raw["greedy"] = worker.ask("greedy", family=family.name)
    if options.all:
        raw["other_dtypes"] = _other_dtypes(options, step, ("fp16", "fp32"), "", {})
        raw["avx2"] = _other_dtypes(options, step, ("bf16", "fp32"), "limited to AVX2", AVX2)
    accuracy = None
    if options.accuracy:
        step(f"accuracy of the trained model {family.shipped}")
        with Worker("accuracy") as worker:
            accuracy = worker.ask("accuracy", model=family.shipped, limit=options.accuracy_limit)
    sizes = raw.pop("sizes")
    return {
        "machine": machine,
        "cpu_info": cpu,
        "sizes": sizes,
        "metrics": metrics.from_raw(raw, sizes),
        "accuracy": accuracy,
        "raw": raw,
    }
