"""Targets of the benchmark: each is compared with the metric of the same key."""

from dataclasses import dataclass

__all__ = [
    "NOTES",
    "PEER_NOTES",
    "PEER_TARGETS",
    "QUANTIZED",
    "QUANTIZED_TARGETS",
    "QVL_NOTES",
    "QVL_TARGETS",
    "TARGETS",
    "Target",
    "not_slower",
    "verdict",
]

QUANTIZED = "packed"  # the option for quantised weights: its name on the command line and in result files
LEAST_RATIO = 0.97  # of every speed row of such a run


@dataclass(frozen=True)
class Target:
    """A bound on one metric; without a bound it is only shown.

    ``needs``: the option of ``python -m bench`` without which it is neither measured nor shown.
    """

    key: str
    label: str
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"
    needs: str = ""

    @property
    def text(self) -> str:
        if self.at_least is None and self.at_most is None:
            return ""
        if self.unit == "cosine":
            return f"≥ {self.at_least:g}"
        sign, bound = ("≥", self.at_least) if self.at_least is not None else ("≤", self.at_most)
        return f"{sign} {100 * bound:g} %" if self.unit == "%" else f"{sign} {bound:g}×"


TARGETS = [
    Target("decode", "decode, bf16 weights", at_least=1.6),
    Target("decode_share", "decode, memory-bandwidth utilisation (MBU)", at_least=0.80, unit="%"),
    Target("vision", "vision encode, one image", at_least=1.7),
    Target("ttft", "time to first token, image + text", at_least=1.7),
    Target("ttft_long", "time to first token, two large images", at_least=1.7),
    Target("peak_rss", "peak RSS", at_most=1.0),
    Target("error_bf16_full", "error, bf16, full model against fp32", at_most=1.1),
    Target("error_bf16_float64", "error, bf16, 4 layers against float64", at_most=1.1),
    Target("error_fp32_float64", "error, fp32, 4 layers against float64", at_most=1.1),
    Target("greedy_fp32", "greedy tokens equal, fp32, odd configs", at_least=1.0, unit="%"),
    Target("vision_best", "vision encode, against stock's best dtype", at_least=1.0, needs="all"),
    Target("ttft_best", "time to first token, against stock's best dtype", at_least=1.05, needs="all"),
    Target("avx2_vision_bf16", "AVX2: vision encode, against stock bf16", at_least=1.0, needs="all"),
    Target("avx2_vision_fp32", "AVX2: vision encode, against stock fp32", at_least=1.0, needs="all"),
    Target("avx2_ttft_bf16", "AVX2: time to first token, against stock bf16", at_least=1.0, needs="all"),
    Target("avx2_ttft_fp32", "AVX2: time to first token, against stock fp32", at_least=1.0, needs="all"),
    Target("avx2_decode_bf16", "AVX2: decode, against stock bf16", at_least=1.0, needs="all"),
    Target("avx2_decode_fp32", "AVX2: decode, against stock fp32", at_least=1.0, needs="all"),
]
# Near the roofline: stricter bounds for bf16, quantised weights, and other engines at the same precision.
QUANTIZED_TARGETS = [
    Target(
        "decode_share", "decode, bf16, memory-bandwidth utilisation (MBU)", at_least=0.90, unit="%", needs=QUANTIZED
    ),
    Target("ttft", "time to first token, image + text, bf16", at_least=1.9, needs=QUANTIZED),
    Target("decode_int8", "decode, int8", at_least=3.0, needs=QUANTIZED),
    Target("decode_int4", "decode, int4", at_least=4.8, needs=QUANTIZED),
    Target("prefill_int8", "text prefill, int8", at_least=4.5, needs=QUANTIZED),
    Target("ttft_int8", "time to first token, image + text, int8", at_least=4.5, needs=QUANTIZED),
    Target("ttft_long_int8", "time to first token, two large images, int8", at_least=4.5, needs=QUANTIZED),
    Target("batch_int8", "decode, batch of 8, int8", at_least=4.0, needs=QUANTIZED),
    Target("peak_rss_long_int8", "peak RSS of the whole run, int8", at_most=0.6, needs=QUANTIZED),
    Target("peak_rss_long_int4", "peak RSS of the whole run, int4", at_most=0.5, needs=QUANTIZED),
    Target(
        "layer_cosine_int8",
        "int8 layers, least cosine with the same rounded numbers",
        at_least=0.9999,
        unit="cosine",
        needs=QUANTIZED,
    ),
    Target(
        "layer_cosine_int4",
        "int4 layers, least cosine with the same rounded numbers",
        at_least=0.999,  # on matrix units prompts multiply int4 that is rounded again, to int8
        unit="cosine",
        needs=QUANTIZED,
    ),
]
PEER_TARGETS = [
    Target("decode_int8_openvino_int8", "decode, int8, against OpenVINO int8", at_least=1.1, needs="peers"),
    Target("decode_int8_llama.cpp_Q8_0", "decode, int8, against llama.cpp Q8_0", at_least=1.5, needs="peers"),
    Target("decode_int4_openvino_int4", "decode, int4, against OpenVINO int4", at_least=1.2, needs="peers"),
    Target("decode_int4_llama.cpp_Q4_0", "decode, int4, against llama.cpp Q4_0", at_least=1.6, needs="peers"),
    Target("prefill_int8_openvino_int8", "text prefill, int8, against OpenVINO int8", at_least=1.8, needs="peers"),
    Target("prefill_int8_llama.cpp_best", "text prefill, int8, against llama.cpp's best", at_least=2.0, needs="peers"),
    Target("ttft_int8_openvino_int8", "time to first token, int8, against OpenVINO int8", at_least=1.7, needs="peers"),
]
# Measured and shown, but without a target.
PEER_NOTES = [
    Target("decode_int8_ik_llama.cpp_Q8_0", "decode, int8, against ik_llama.cpp Q8_0", needs="peers"),
    Target("decode_int4_ik_llama.cpp_Q4_0", "decode, int4, against ik_llama.cpp Q4_0", needs="peers"),
    Target("prefill_int8_ik_llama.cpp_best", "text prefill, int8, against ik_llama.cpp's best", needs="peers"),
    Target("ttft_int4_openvino_int4", "time to first token, int4, against OpenVINO int4", needs="peers"),
    Target("decode_ours_llama.cpp_bf16", "decode, bf16, against llama.cpp bf16", needs="peers"),
    Target("decode_ours_ik_llama.cpp_bf16", "decode, bf16, against ik_llama.cpp bf16", needs="peers"),
]
QUANTIZED_NOTES = [
    Target("decode_share_int8", "decode, int8, memory-bandwidth utilisation (MBU)", unit="%", needs=QUANTIZED),
    Target("decode_share_int4", "decode, int4, memory-bandwidth utilisation (MBU)", unit="%", needs=QUANTIZED),
    Target("vision_int8", "vision encode, one image, int8", needs=QUANTIZED),
    Target("prefill_int4", "text prefill, int4", needs=QUANTIZED),
    Target("ttft_int4", "time to first token, image + text, int4", needs=QUANTIZED),
    Target("batch", "decode, batch of 8, bf16", needs=QUANTIZED),
    Target("batch_int4", "decode, batch of 8, int4", needs=QUANTIZED),
]
NOTES = [
    Target("prefill", "text prefill"),
    Target("peak_rss_long", "peak RSS after the large images"),
    *QUANTIZED_NOTES,
]

QVL_TARGETS = [
    Target("decode", "decode, bf16 weights", at_least=1.6),
    Target("ttft", "time to first token, image + text", at_least=1.5),
    Target("peak_rss", "peak RSS", at_most=1.0),
    Target("error_bf16_full", "error, bf16, full model against fp32", at_most=1.1),
    Target("error_bf16_float64", "error, bf16, 4 layers against float64", at_most=1.1),
    Target("error_fp32_float64", "error, fp32, 4 layers against float64", at_most=1.1),
    Target("greedy_fp32", "greedy tokens equal, fp32, odd configs", at_least=1.0, unit="%"),
    Target("decode_int8", "decode, int8", at_least=3.0, needs=QUANTIZED),
    Target("ttft_int8", "time to first token, image + text, int8", at_least=3.5, needs=QUANTIZED),
]
QVL_NOTES = [
    Target("decode_share", "decode, memory-bandwidth utilisation (MBU)", unit="%"),
    Target("vision", "vision encode, one image"),
    Target("ttft_long", "time to first token, two large images"),
    *NOTES,
]


def verdict(target: Target, value: float | None, limit: float | None = None) -> str:
    """ "pass", "miss", "" without a bound, or "–" when the metric was not measured.

    ``limit``: the value at the roofline. A bound beyond it is "at the limit" instead of a miss.

    Example:
        >>> verdict(Target("decode", "decode", at_least=1.6), 1.7)
        'pass'
    """
    if value is None:
        return "–"
    if target.at_least is not None:
        if value >= target.at_least:
            return "pass"
        return "miss" if limit is None or limit >= target.at_least else "at the limit"
    if target.at_most is not None:
        return "pass" if value <= target.at_most else "miss"
    return ""


def not_slower(metric: dict) -> bool:
    """Whether a row is as fast as stock, or faster: its median is, but for noise, and its range reaches 1."""
    return metric["value"] >= LEAST_RATIO and metric["high"] >= 1.0
