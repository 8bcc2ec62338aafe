"""Targets of `make bench-gpu` on an H100 in bf16: how each metric follows from the measured cases, and its bound."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.targets import Target

__all__ = ["BANDWIDTH_KERNELS", "TARGETS", "GpuTarget", "bandwidth_share", "speed"]

# Memory-bound ops, compared with the bandwidth of a copy.
BANDWIDTH_KERNELS = (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "add_layer_norm",
    "qk_norm_rope",
    "vision_rope",
    "swiglu",
)
ATTENTION_KERNELS = ("attention train", "attention 16k", "attention full", "attention vision")

Cases = dict[str, dict]  # name -> value of a case that was measured


def speed(cases: Cases, case: str, side: str, baseline: str) -> float | None:
    """Speed-up of ours over ``baseline`` in one part of a case ("forward", "first", "decode"...)."""
    times = cases.get(case, {}).get(side, {})
    return times[baseline]["median"] / times["ours"]["median"] if baseline in times and "ours" in times else None


def bandwidth_share(cases: Cases, case: str) -> float | None:
    """Memory-bandwidth utilisation: achieved bandwidth of our forward over that of a copy of as many bytes, interleaved
    where that was timed, else of a large one.
    """
    if "copy" in cases.get(case, {}).get("forward", {}):
        return speed(cases, case, "forward", "copy")
    if case not in cases or "copy" not in cases:
        return None
    return cases[case]["bytes"] / cases[case]["forward"]["ours"]["median"] / 1e6 / cases["copy"]["gb_s"]


def _worst(values: Iterable[float | None]) -> float | None:
    """The least of those that were measured."""
    return min((value for value in values if value is not None), default=None)


def _peak_ratio(ours: str, stock: str, *, above_weights: bool = False) -> Callable[[Cases], float | None]:
    def value(cases: Cases) -> float | None:
        if ours not in cases or stock not in cases:
            return None
        mine, theirs = (
            cases[name]["peak"] - (cases[name]["weights"] if above_weights else 0) for name in (ours, stock)
        )
        return mine / theirs if theirs else None

    return value


def _step_ratio(cases: Cases) -> float | None:
    if "train accelerated" not in cases or "train stock" not in cases:
        return None
    return cases["train stock"]["step"]["median"] / cases["train accelerated"]["step"]["median"]


def _memory_ratio(case: str, baseline: str) -> Callable[[Cases], float | None]:
    def value(cases: Cases) -> float | None:
        used = cases.get(case, {}).get("memory", {})
        return used["ours"] / used[baseline] if used.get(baseline) and "ours" in used else None

    return value


def _decode_share(cases: Cases) -> float | None:
    if "generate" not in cases or "copy" not in cases:
        return None
    generated = cases["generate"]
    return generated["bytes_per_token"] / generated["replay"]["ours"]["median"] / 1e6 / cases["copy"]["gb_s"]


def _fits(cases: Cases) -> float | None:
    return cases["fp16 in 8 GB"]["peak"] / cases["fp16 in 8 GB"]["limit"] if "fp16 in 8 GB" in cases else None


def _error_ratio(cases: Cases) -> float | None:
    """The largest ratio of our error to the baseline's, both against fp32; at least one bf16 ulp is allowed where the
    baseline is exact.
    """
    ratios = [
        value["errors"]["ours"]
        / max(2**-8, next(e for name, e in value["errors"].items() if name not in ("ours", *value.get("variants", ()))))
        for value in cases.values()
        if len(value.get("errors", {})) > 1 and "ours" in value["errors"]
    ]
    return max(ratios, default=None)


@dataclass(frozen=True)
class GpuTarget:
    """A bound and how to get its value; ``stretch`` targets do not decide the verdict."""

    target: Target
    value: Callable[[Cases], float | None]
    stretch: bool = False


def _over(case: str, side: str, baseline: str = "stock") -> Callable[[Cases], float | None]:
    return lambda cases: speed(cases, case, side, baseline)


TARGETS = [
    GpuTarget(Target("first", "first token, image + text, batch 1", at_least=1.25), _over("generate", "first")),
    GpuTarget(Target("decode_1", "decode, batch 1", at_least=4.0), _over("generate", "decode")),
    GpuTarget(Target("decode_32", "decode, batch 32", at_least=2.0), _over("decode 32", "decode")),
    GpuTarget(
        Target("memory", "inference peak memory above weights", at_most=0.85),
        _peak_ratio("memory accelerated", "memory stock", above_weights=True),
    ),
    GpuTarget(
        Target("memory_int8", "inference peak memory, int8 weights", at_most=0.6),
        _peak_ratio("memory int8", "memory stock"),
    ),
    GpuTarget(Target("fits", "fp16 inference, share of 8 GB", at_most=1.0), _fits),
    GpuTarget(Target("train", "training step, 4 x 2048, AdamW", at_least=1.25), _step_ratio),
    GpuTarget(
        Target("train_memory", "training peak memory", at_most=0.7), _peak_ratio("train accelerated", "train stock")
    ),
    GpuTarget(
        Target("bandwidth", "norms, RoPE, SwiGLU: share of copy bandwidth, the worst", at_least=0.85, unit="%"),
        lambda cases: _worst(bandwidth_share(cases, name) for name in BANDWIDTH_KERNELS),
    ),
    GpuTarget(
        Target("liger", "norms, SwiGLU against Liger, forward, the worst", at_least=1.0),
        lambda cases: _worst(speed(cases, name, "forward", "liger") for name in BANDWIDTH_KERNELS),
    ),
    GpuTarget(
        Target("flash_forward", "attention against FLASH, forward, the worst", at_least=1.0),
        lambda cases: _worst(speed(cases, name, "forward", "flash") for name in ATTENTION_KERNELS),
    ),
    GpuTarget(
        Target("flash_backward", "attention against FLASH, backward, the worst", at_least=0.9),
        lambda cases: _worst(speed(cases, name, "backward", "flash") for name in ATTENTION_KERNELS),
    ),
    GpuTarget(
        Target("cross", "cross_attention against SDPA with a mask", at_least=1.0),
        _over("cross_attention", "forward", "sdpa"),
    ),
    GpuTarget(
        Target("lce", "linear_cross_entropy against Liger, backward included", at_least=1.0),
        lambda cases: _worst(speed(cases, "linear_cross_entropy", side, "liger") for side in ("forward", "backward")),
    ),
    GpuTarget(
        Target("lce_memory", "linear_cross_entropy, memory against Liger", at_most=1.0),
        _memory_ratio("linear_cross_entropy", "liger"),
    ),
    GpuTarget(Target("error", "error against fp32, over PyTorch's own, the worst", at_most=2.0), _error_ratio),
    GpuTarget(
        Target("decode_share", "decode CUDA graph, batch 1, MBU of the copy bandwidth", at_least=0.8, unit="%"),
        _decode_share,
        stretch=True,
    ),
    GpuTarget(Target("decode_12", "decode, batch 1", at_least=12.0), _over("generate", "decode"), stretch=True),
    GpuTarget(
        Target("cudnn", "attention against cuDNN, forward, the worst", at_least=1.0),
        lambda cases: _worst(speed(cases, name, "forward", "cudnn") for name in ATTENTION_KERNELS),
        stretch=True,
    ),
    GpuTarget(
        Target("first_18", "first token, image + text, batch 1", at_least=1.8), _over("generate", "first"), stretch=True
    ),
]
