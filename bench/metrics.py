"""From raw times, sizes and errors to the numbers of the table: one metric per key of targets.py, and a few notes."""

from bench.timing import median, paired_ratio

__all__ = ["from_raw"]


def _metric(value: float, stock: str, ours: str, low: float | None = None, high: float | None = None, **more) -> dict:
    return {"value": value, "low": low, "high": high, "stock": stock, "ours": ours, **more}


def _speed(pair: dict[str, list[float]], show) -> dict:
    ratio = paired_ratio(pair["stock"], pair["ours"])
    return _metric(ratio["median"], show(median(pair["stock"])), show(median(pair["ours"])), ratio["low"], ratio["high"])


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def _rate(value: float) -> str:
    return f"{1 / value:.2f} tok/s"


def _lower_is_better(pair: dict[str, float], show) -> dict:
    return _metric(pair["ours"] / pair["stock"], show(pair["stock"]), show(pair["ours"]))


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def _best_dtype(raw: dict, operation: str) -> dict:
    """Against whichever dtype is fastest for stock, bf16 included."""
    candidates = {"bf16": raw["times"], **raw["other_dtypes"]}
    dtype = min(candidates, key=lambda name: median(candidates[name][operation]["stock"]))
    best = _speed(candidates[dtype][operation], _seconds)
    return {**best, "stock": f"{best['stock']} ({dtype})", "dtype": dtype}


def _decode_share(raw: dict, sizes: dict) -> dict:
    bandwidth = median(raw["bandwidth"]) * 1e9
    rates = {who: sizes["bytes_per_token"] / median(values) for who, values in raw["times"]["decode"].items()}
    shares = {who: rate / bandwidth for who, rate in rates.items()}
    return _metric(shares["ours"], f"{100 * shares['stock']:.1f} %", f"{100 * shares['ours']:.1f} %", bandwidth_gb_s=bandwidth / 1e9)


def from_raw(raw: dict, sizes: dict) -> dict[str, dict]:
    """Metrics by key: {"value", "low", "high", "stock", "ours"}; the last two are for people, ``value`` meets the target."""
    times = raw["times"]
    result = {
        "decode": _speed(times["decode"], _rate),
        "decode_share": _decode_share(raw, sizes),
        "vision": _speed(times["vision"], _seconds),
        "ttft": _speed(times["ttft"], _seconds),
        "prefill": _speed(times["prefill"], lambda value: f"{sizes['text_only_tokens'] / value:.1f} tok/s"),
        "peak_rss": _lower_is_better(raw["peak_rss"], _gigabytes),
        "greedy_fp32": _metric(raw["greedy"]["share"], "–", f"{raw['greedy']['compared']} tokens compared"),
    }
    if "ttft_long" in times:
        result["ttft_long"] = _speed(times["ttft_long"], _seconds)
        result["peak_rss_long"] = _lower_is_better(raw["peak_rss_long"], _gigabytes)
    for name, pair in raw["errors"].items():
        result[f"error_{name}"] = _lower_is_better(pair, lambda value: f"{value:.2e}")
    if "other_dtypes" in raw:
        result |= {f"{operation}_best": _best_dtype(raw, operation) for operation in ("vision", "ttft")}
        for dtype, limited in raw["avx2"].items():
            result |= {f"avx2_{operation}_{dtype}": _speed(limited[operation], _rate if operation == "decode" else _seconds)
                       for operation in ("vision", "ttft", "decode")}
    return result
