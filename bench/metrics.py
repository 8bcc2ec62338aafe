"""Metrics from raw times, sizes and errors: one per key of targets.py, and a few notes."""

from collections.abc import Callable
from typing import Any

from bench.roofline import Machine, Work, least_seconds
from bench.timing import median, paired_ratio

__all__ = ["from_raw"]

_WEIGHTS = {"ours": "bf16"}  # variant -> format of its weights, where the names differ
# Speed row -> beginnings and ends of its kinds of work (qvl_kernels/tuning.py).
_FEW, _MANY = ("linear", "few tokens"), ("linear", "many tokens")
_KINDS = {
    "decode": [_FEW],
    "batch": [_FEW],
    "prefill": [_MANY, ("causal attention", "")],
    "vision": [_MANY, ("attention", "")],
    "ttft": [_MANY, ("attention", ""), ("causal attention", "")],
}
_KINDS["ttft_long"] = _KINDS["ttft"]


def _metric(
    value: float, stock: str, ours: str, low: float | None = None, high: float | None = None, **more: Any
) -> dict:
    return {"value": value, "low": low, "high": high, "stock": stock, "ours": ours, **more}


def _speed(
    times: dict[str, list[float]],
    show: Callable[[float], str],
    variant: str = "ours",
    baseline: str = "stock",
    roofline_seconds: dict[str, float] | None = None,
) -> dict:
    """A ratio of times. With ``roofline_seconds``, those of ``variant`` and possibly of ``baseline``: the shares of the
    roofline that are reached, and "limit", the ratio that it allows.
    """
    ratio = paired_ratio(times[baseline], times[variant])
    medians = {who: median(times[who]) for who in (baseline, variant)}
    more = {}
    if roofline_seconds:
        more = {
            "roofline": show(roofline_seconds[variant]),
            "share": roofline_seconds[variant] / medians[variant],
            "limit": medians[baseline] / roofline_seconds[variant],
            "floors": roofline_seconds,
            "baseline_share": roofline_seconds[baseline] / medians[baseline] if baseline in roofline_seconds else None,
        }
    return _metric(
        ratio["median"], show(medians[baseline]), show(medians[variant]), ratio["low"], ratio["high"], **more
    )


def _roofline_seconds(
    raw: dict, row: str, variant: str, stock: str | None = "bf16", peaks: dict | None = None
) -> dict | None:
    """Seconds of a row at the roofline, by variant; None for results that did not measure it.

    Args:
        stock: its dtype; None, or one without a roofline, leaves it out.
        peaks: of a machine that was limited, other than those of the main phase.
    """
    if "work" not in raw:
        return None
    machine = Machine.of(peaks or raw["peaks"], raw["bandwidth"])
    passes = [Work(**work) for work in raw["work"][row]]
    seconds = {variant: least_seconds(passes, machine, _WEIGHTS.get(variant, variant))}
    return seconds | ({"stock": least_seconds(passes, machine, stock, stock)} if stock in ("bf16", "fp32") else {})


def _is_pytorchs(kernels: list[str], row: str, variant: str) -> bool:
    """Whether all kinds of work of a row that can go to PyTorch's kernels do. Few tokens over quantised weights
    cannot.
    """
    if _KINDS[row] == [_FEW] and variant != "ours":
        return False
    found = [
        rest.startswith("pytorch")
        for kind, _, rest in (line.partition(": ") for line in kernels)
        if any(kind.startswith(begin) and kind.endswith(end) for begin, end in _KINDS[row])
    ]
    return bool(found) and all(found)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def _rate(value: float) -> str:
    return f"{1 / value:.2f} tok/s"


def _lower_is_better(values: dict[str, float], show: Callable[[float], str], variant: str = "ours") -> dict:
    return _metric(values[variant] / values["stock"], show(values["stock"]), show(values[variant]))


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def _best_dtype(raw: dict, operation: str) -> dict:
    """Against whichever dtype is fastest for stock, bf16 included."""
    candidates = {"bf16": raw["times"], **raw["other_dtypes"]}
    dtype = min(candidates, key=lambda name: median(candidates[name][operation]["stock"]))
    best = _speed(
        candidates[dtype][operation], _seconds, roofline_seconds=_roofline_seconds(raw, operation, "ours", dtype)
    )
    return {**best, "stock": f"{best['stock']} ({dtype})", "dtype": dtype}


def _decode_share(raw: dict, variant: str) -> dict:
    """Memory-bandwidth utilisation of decode: achieved bandwidth over the one measured around the same tokens, per
    round.
    """
    shares = {
        who: [
            raw["bytes_per_token"][who] / seconds / (gb_s * 1e9)
            for seconds, gb_s in zip(raw["times"]["decode"][who], raw["bandwidth"][who])
        ]
        for who in ("stock", variant)
    }
    stock, ours = (f"{100 * median(shares[who]):.1f} %" for who in ("stock", variant))
    bandwidth = median(raw["bandwidth"][variant])
    return _metric(
        median(shares[variant]), stock, ours, min(shares[variant]), max(shares[variant]), bandwidth_gb_s=bandwidth
    )


def _main_phase(raw: dict, sizes: dict, variant: str) -> dict[str, dict]:
    """One variant against stock."""
    times = raw["times"]
    kernels = raw.get("routes")

    def speed(row: str, show: Callable[[float], str]) -> dict:
        metric = _speed(times[row], show, variant, roofline_seconds=_roofline_seconds(raw, row, variant))
        if isinstance(kernels, dict):
            metric["kernels"] = "pytorch" if _is_pytorchs(kernels[variant], row, variant) else "qvl"
        return metric

    result = {
        "decode": speed("decode", _rate),
        "decode_share": _decode_share(raw, variant),
        "vision": speed("vision", _seconds),
        "ttft": speed("ttft", _seconds),
        "prefill": speed("prefill", lambda value: f"{sizes['text_only_tokens'] / value:.1f} tok/s"),
        "peak_rss": _lower_is_better(raw["peak_rss"], _gigabytes, variant),
        "error_bf16_full": _lower_is_better(raw["errors"]["bf16_full"], _scientific, variant),
    }
    if "ttft_long" in times:
        result["ttft_long"] = speed("ttft_long", _seconds)
        result["peak_rss_long"] = _lower_is_better(raw["peak_rss_long"], _gigabytes, variant)
    if "batch" in times:
        rows = raw["batch"]
        result["batch"] = speed("batch", lambda value: _rate(value / rows))
    return result


def _other_engines(raw: dict, sizes: dict) -> dict[str, dict]:
    """Ours against each other engine and format, "decode_int8_openvino_int8" for example, and against the engine's
    format with the fastest prefill.
    """
    times = raw["peers"]["times"]
    shows = {
        "decode": _rate,
        "ttft": _seconds,
        "prefill": lambda value: f"{sizes['text_only_tokens'] / value:.1f} tok/s",
    }
    result, best = {}, {}
    for name, measured in times.items():
        for operation, values in measured.items():
            for variant in values.keys() - {"peer"}:
                result[f"{operation}_{variant}_{name.replace(' ', '_')}"] = _speed(
                    values, shows[operation], variant, "peer", _roofline_seconds(raw, operation, variant, None)
                )
        engine = name.split()[0]
        fastest = best.get(engine)
        if fastest is None or median(measured["prefill"]["peer"]) < median(times[fastest]["prefill"]["peer"]):
            best[engine] = name
    for engine, name in best.items():
        roofline_seconds = _roofline_seconds(raw, "prefill", "int8", None)
        result[f"prefill_int8_{engine}_best"] = _speed(
            times[name]["prefill"], shows["prefill"], "int8", "peer", roofline_seconds
        )
    return result


def _scientific(value: float) -> str:
    return f"{value:.2e}"


def from_raw(raw: dict, sizes: dict) -> dict[str, dict]:
    """Metrics by key: {"value", "low", "high", "stock", "ours"}; the last two are for people, ``value`` meets the
    target.

    Keys of other variants than "ours" end in their name, as in "decode_int8", and those against other engines in the
    engine's name after it. Speed rows also have their roofline (``_speed``) and "kernels", whose they are.
    """
    result = _main_phase(raw, sizes, "ours")
    for variant in raw["peak_rss"].keys() - {"stock", "ours"}:
        result |= {f"{key}_{variant}": metric for key, metric in _main_phase(raw, sizes, variant).items()}
    result["greedy_fp32"] = _metric(raw["greedy"]["share"], "–", f"{raw['greedy']['compared']} tokens compared")
    for name in ("bf16_float64", "fp32_float64"):
        result[f"error_{name}"] = _lower_is_better(raw["errors"][name], _scientific)
    result |= {f"layer_cosine_{name}": _metric(value, "–", "–") for name, value in raw.get("layer_cosines", {}).items()}
    if "peers" in raw:
        result |= _other_engines(raw, sizes)
    if "other_dtypes" in raw:
        result |= {f"{operation}_best": _best_dtype(raw, operation) for operation in ("vision", "ttft")}
        for dtype, limited in raw["avx2"].items():
            result |= {
                f"avx2_{operation}_{dtype}": _speed(
                    limited[operation],
                    _rate if operation == "decode" else _seconds,
                    roofline_seconds=_roofline_seconds(raw, operation, "ours", dtype, limited.get("peaks")),
                )
                for operation in ("vision", "ttft", "decode")
            }
    return result
