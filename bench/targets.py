"""What the benchmark must show, in one place: each target is compared with the metric of the same key."""

from dataclasses import dataclass

__all__ = ["NOTES", "QVL_NOTES", "QVL_TARGETS", "TARGETS", "Target", "verdict"]


@dataclass(frozen=True)
class Target:
    """A bound on one metric, or none: then it is only shown. ``needs_all``: measured by ``python -m bench --all`` only."""

    key: str
    label: str
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"
    needs_all: bool = False

    @property
    def text(self) -> str:
        if self.at_least is None and self.at_most is None:
            return ""
        sign, bound = ("≥", self.at_least) if self.at_least is not None else ("≤", self.at_most)
        return f"{sign} {100 * bound:g} %" if self.unit == "%" else f"{sign} {bound:g}×"


TARGETS = [
    Target("decode", "decode, bf16 weights", at_least=1.6),
    Target("decode_share", "decode, share of read bandwidth", at_least=0.80, unit="%"),
    Target("vision", "vision encode, one image", at_least=1.7),
    Target("ttft", "time to first token, image + text", at_least=1.7),
    Target("ttft_long", "time to first token, two large images", at_least=1.7),
    Target("peak_rss", "peak RSS", at_most=1.0),
    Target("error_bf16_full", "error, bf16, full model against fp32", at_most=1.1),
    Target("error_bf16_float64", "error, bf16, 4 layers against float64", at_most=1.1),
    Target("error_fp32_float64", "error, fp32, 4 layers against float64", at_most=1.1),
    Target("greedy_fp32", "greedy tokens equal, fp32, odd configs", at_least=1.0, unit="%"),
    Target("vision_best", "vision encode, against stock's best dtype", at_least=1.0, needs_all=True),
    Target("ttft_best", "time to first token, against stock's best dtype", at_least=1.05, needs_all=True),
    Target("avx2_vision_bf16", "AVX2: vision encode, against stock bf16", at_least=1.0, needs_all=True),
    Target("avx2_vision_fp32", "AVX2: vision encode, against stock fp32", at_least=1.0, needs_all=True),
    Target("avx2_ttft_bf16", "AVX2: time to first token, against stock bf16", at_least=1.0, needs_all=True),
    Target("avx2_ttft_fp32", "AVX2: time to first token, against stock fp32", at_least=1.0, needs_all=True),
    Target("avx2_decode_bf16", "AVX2: decode, against stock bf16", at_least=1.0, needs_all=True),
    Target("avx2_decode_fp32", "AVX2: decode, against stock fp32", at_least=1.0, needs_all=True),
]
# Measured and shown, but without a target.
NOTES = [Target("prefill", "text prefill"), Target("peak_rss_long", "peak RSS after the large images")]

QVL_TARGETS = [
    Target("decode", "decode, bf16 weights", at_least=1.6),
    Target("ttft", "time to first token, image + text", at_least=1.5),
    Target("peak_rss", "peak RSS", at_most=1.0),
    Target("error_bf16_full", "error, bf16, full model against fp32", at_most=1.1),
    Target("error_bf16_float64", "error, bf16, 4 layers against float64", at_most=1.1),
    Target("error_fp32_float64", "error, fp32, 4 layers against float64", at_most=1.1),
    Target("greedy_fp32", "greedy tokens equal, fp32, odd configs", at_least=1.0, unit="%"),
]
QVL_NOTES = [
    Target("decode_share", "decode, share of read bandwidth", unit="%"), Target("vision", "vision encode, one image"),
    Target("ttft_long", "time to first token, two large images"), *NOTES,
]  # fmt: skip


def verdict(target: Target, value: float | None) -> str:
    """"pass", "miss", "" without a bound, or "–" when the metric was not measured.

    Example:
        >>> verdict(Target("decode", "decode", at_least=1.6), 1.7)
        'pass'
    """
    if value is None:
        return "–"
    if target.at_least is not None:
        return "pass" if value >= target.at_least else "miss"
    if target.at_most is not None:
        return "pass" if value <= target.at_most else "miss"
    return ""
