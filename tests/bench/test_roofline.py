"""Rooflines: operations and bytes of small configs counted by hand and of the full ones by their modules, then the
verdicts.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from bench import metrics, report
from bench.__main__ import RESULTS
from bench.families import FAMILIES
from bench.roofline import Machine, Work, least_seconds
from bench.targets import Target, not_slower, verdict

# A decoder layer: q and o 64 elements each, k and v 32 each, three matrices of 128 in the MLP: 576. The head: 80.
DECODER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 10,
}
# A vision layer: 48 elements in q, k, v and 16 behind them, two matrices of 32 in the MLP: 128. The patches: 48.
QWEN = SimpleNamespace(
    text_config=SimpleNamespace(**DECODER),
    vision_config=SimpleNamespace(
        depth=2,
        hidden_size=4,
        intermediate_size=8,
        in_channels=3,
        patch_size=2,
        temporal_patch_size=1,
        spatial_merge_size=2,
        out_hidden_size=8,
        deepstack_visual_indexes=[0],
    ),
)
QVL = SimpleNamespace(
    **DECODER,
    cross_attention_layers=[1],
    language_projection_dim=6,
    vision_projection_dim=5,
    vision_num_hidden_layers=2,
    vision_hidden_size=4,
    vision_intermediate_size=8,
    vision_num_channels=3,
    vision_patch_size=2,
    connector_type="attention",
    connector_num_layers=1,
    num_query_tokens=2,
)


def test_qwen3_vl_by_hand():
    family = FAMILIES["qwen3-vl"]
    # Two mergers of 16 x 16 and 16 x 8 elements over 2 tokens; 2 images of 4 patches: 32 pairs in each of 2 layers.
    assert family.vision_work(QWEN, patches=8, images=2) == Work(
        linear=2 * (8 * (48 + 2 * 128) + 2 * 768), attention=2 * 32 * 4 * 4, weights=48 + 2 * 128 + 768
    )
    # Query i of 3 sees i keys: 6 pairs; 2 heads of 4.
    assert family.prompt_work(QWEN, tokens=3, visual=2) == Work(
        linear=2 * (3 * 1152 + 80), attention=2 * 6 * 4 * 8, weights=1152 + 80, cache=2 * 2 * 4 * 3
    )
    assert family.step_work(QWEN, rows=2, keys=7, visual=0) == Work(
        linear=2 * 2 * (1152 + 80), attention=2 * 7 * 4 * 8, weights=1152 + 80, cache=2 * 2 * 4 * 7
    )


def test_qvl_by_hand():
    family = FAMILIES["qvl"]
    # Connector: q and o 50 and the MLP 80 over 4 queries, k and v 40 over 8 patches; each query sees 4 patches.
    assert family.vision_work(QVL, patches=8, images=2) == Work(
        linear=2 * (8 * (48 + 2 * 128) + 4 * 130 + 8 * 40),
        attention=2 * 32 * 4 * 4 + 16 * 4 * 5,
        weights=48 + 2 * 128 + 130 + 40,
    )
    # One layer of cross-attention: q and o 96 over 3 tokens, k and v 30 over 4 visual ones; 12 pairs in 2 heads of 3.
    assert family.prompt_work(QVL, tokens=3, visual=4) == Work(
        linear=2 * (3 * 1152 + 80 + 3 * 96 + 4 * 30),
        attention=2 * 6 * 4 * 8 + 12 * 4 * 6,
        weights=1152 + 80 + 96 + 30,
        cache=2 * 2 * 4 * 3 + 2 * 3 * 4,
    )
    assert family.step_work(QVL, rows=1, keys=5, visual=4) == Work(
        linear=2 * (1152 + 80 + 96),
        attention=2 * 5 * 4 * 8 + 4 * 4 * 6,
        weights=1152 + 80 + 96,
        cache=2 * 2 * 4 * 5 + 2 * 3 * 4,
    )
    assert family.prompt_work(QVL, tokens=3, visual=0) == FAMILIES["qwen3-vl"].prompt_work(QWEN, tokens=3, visual=0)


def _elements(module: torch.nn.Module) -> int:
    return sum(
        x.numel()
        for name, x in module.named_parameters()
        if x.dim() > 1 and "pos" not in name and "queries" not in name
    )


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_full_size_by_modules(family):
    config = family.config(**family.full_config())
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    inner = model.model
    vision = [inner.visual] if family.name == "qwen3-vl" else [inner.visual, inner.connector]
    assert family.vision_work(config, 784, 1).weights == sum(map(_elements, vision))
    text = _elements(inner.language_model.layers) + model.lm_head.weight.numel()
    assert family.prompt_work(config, 262, 196).weights == text


@pytest.mark.parametrize(("name", "visual", "keys"), [("zen5", 196, 262), ("zen5-qvl", 256, 67)])
def test_bytes_of_a_step_are_those_of_the_modules(name, visual, keys):
    """But for norms and the scales of int8."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    family = report.family_of_result(result)
    work = family.step_work(family.config(**family.full_config()), 1, keys, visual)
    slow = Machine({"fma": 1e9}, 1.0)  # 1 GB/s, and operations for nothing
    for variant, weights in (("ours", "bf16"), ("int8", "int8")):
        counted = 1e9 * least_seconds([work], slow, weights)
        assert counted == pytest.approx(result["raw"]["bytes_per_token"][variant], rel=0.01)


def test_floor_is_the_longer_of_operations_and_bytes_of_each_pass():
    machine = Machine.of(
        {"fma": [50.0, 100.0], "bf16_tiles": [400.0], "int8_tiles": [800.0]}, {"a": [9.0], "b": [10.0]}
    )
    compute, memory = Work(linear=8e9, attention=4e9, weights=1e6), Work(linear=1e6, weights=1e9, cache=5e8)
    assert least_seconds([compute], machine, "bf16") == pytest.approx(12 / 400)
    assert least_seconds([compute], machine, "int4") == pytest.approx(8 / 800 + 4 / 400)
    assert least_seconds([compute], machine, "fp32", "fp32") == pytest.approx(12 / 100)
    assert least_seconds([memory], machine, "bf16") == pytest.approx(3 / 10)
    assert least_seconds([memory], machine, "int8") == pytest.approx((1 + 1) / 10)
    assert least_seconds([compute, memory], machine, "bf16") == pytest.approx(12 / 400 + 3 / 10)


@pytest.mark.parametrize(
    ("value", "limit", "expected"),
    [
        (1.8, 1.9, "pass"),
        (1.7, 1.6, "pass"),  # measured beyond a roofline that other programs lowered
        (1.5, 1.9, "miss"),
        (1.5, 1.7, "miss"),
        (1.5, 1.69, "at the limit"),
        (1.5, None, "miss"),
        (None, 1.0, "–"),
    ],
)
def test_verdict_at_the_roofline(value, limit, expected):
    assert verdict(Target("a", "a", at_least=1.7), value, limit) == expected
    assert verdict(Target("a", "a"), value, limit) == ("–" if value is None else "")


@pytest.mark.parametrize(
    ("value", "high", "expected"),
    [(2.0, 2.2, True), (0.98, 1.01, True), (0.97, 1.0, True), (0.96, 1.1, False), (0.99, 0.995, False)],
)
def test_not_slower_than_stock(value, high, expected):
    assert not_slower({"value": value, "low": 0.9, "high": high}) == expected


def _raw(ours: float) -> dict:
    """A run in which stock takes 1 s for each row, of 40 GFLOP or 1 GB at 100 GFLOP/s and 10 GB/s in bf16."""
    rows = ("vision", "ttft", "ttft_long", "prefill", "decode", "batch")
    compute, memory = {"linear": 40e9, "weights": 1.0}, {"weights": 5e8}
    return {
        "times": {row: {"stock": [1.0, 1.0], "ours": [ours, ours], "int8": [0.5, 0.5]} for row in rows},
        "bytes_per_token": {"stock": 1e9, "ours": 1e9, "int8": 5e8},
        "bandwidth": {"stock": [10.0, 10.0], "ours": [9.0, 9.0], "int8": [9.0, 9.0]},
        "peaks": {"fma": [50.0, 40.0], "bf16_tiles": [100.0, 60.0], "int8_tiles": [200.0, 200.0]},
        "work": {row: [memory if row in ("decode", "batch") else compute] for row in rows},
        "routes": {
            "ours": ["linear bf16, few tokens: qvl, 1 ms against 2 ms"]
            + [f"{kind} bf16, many tokens: pytorch, 1 ms against 2 ms" for kind in ("linear", "attention")]
            + ["causal attention bf16, many tokens: qvl, not measured"],
            "int8": ["linear bf16 with int8 weights, many tokens: qvl, 1 ms against 2 ms"],
        },
        "batch": 2,
        "peak_rss": {"stock": 2, "ours": 1, "int8": 1},
        "peak_rss_long": {"stock": 2, "ours": 1, "int8": 1},
        "errors": {"bf16_full": {"stock": 1, "ours": 1, "int8": 1}}
        | {f"{dtype}_float64": {"stock": 1, "ours": 1} for dtype in ("bf16", "fp32")},
        "greedy": {"share": 1.0, "compared": 1},
        "fallbacks": [],
    }


def _rows(raw: dict, packed: bool = True) -> dict[str, dict[str, str]]:
    found = metrics.from_raw(raw, {"text_only_tokens": 10})
    result = {"options": {"packed": packed}, "metrics": found, "raw": raw}
    names = report.columns(result)
    return {row[0]: dict(zip(names, row, strict=True)) for row in report.rows(result)}


def test_rows_show_their_roofline_and_the_share_of_it():
    rows = _rows(_raw(ours=0.8))
    vision, decode = rows["vision encode, one image"], rows["decode, bf16 weights"]
    assert (vision["roofline"], vision["of it"], vision["ratio"]) == ("400.0 ms", "50 %", "1.25×")
    assert vision["result"] == "miss"  # 2.5 times is possible
    assert (decode["roofline"], decode["of it"]) == ("10.00 tok/s", "12 %")
    assert rows["vision encode, one image, int8"]["roofline"] == "200.0 ms"
    assert rows["time to first token, image + text, int8"]["result"] == "miss"  # 4.5 of at most 5
    assert rows["peak RSS"]["roofline"] == rows["peak RSS"]["not slower"] == ""


def test_a_target_beyond_the_roofline_is_at_the_limit_with_both_figures():
    raw = _raw(ours=0.8)
    raw["work"]["vision"][0]["linear"] = 64e9
    row = _rows(raw)["vision encode, one image"]
    assert row["result"] == "at the limit (1.56×, 80 %)"
    raw["peaks"]["bf16_tiles"].append(120.0)
    assert _rows(raw)["vision encode, one image"]["result"] == "miss"


def test_rows_of_packed_runs_say_whether_they_are_slower_and_whose_kernels_ran():
    rows = {name: row["not slower"] for name, row in _rows(_raw(ours=1.05)).items()}
    assert rows["vision encode, one image"] == "miss (PyTorch's kernels)"
    assert rows["text prefill"] == rows["decode, bf16 weights"] == rows["decode, batch of 8, bf16"] == "miss"
    assert rows["time to first token, image + text"] == "miss"  # causal attention is ours
    assert rows["decode, int8"] == rows["text prefill, int8"] == "pass"
    assert "not slower" not in _rows(_raw(ours=1.05), packed=False)["decode, bf16 weights"]


@pytest.mark.parametrize("name", ["zen4", "zen5", "zen5-qvl"])
def test_older_results_have_no_rooflines(name):
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert {len(row) for row in [*report.rows(result), *report.accuracy_rows(result)]} == {7}
    assert report.columns(result) == ("", "stock", "accelerated", "ratio", "range", "target", "result")


def test_metrics_of_older_raw_numbers_are_the_same():
    result = json.loads((RESULTS / "zen5.json").read_text())
    again = metrics.from_raw(result["raw"], result["sizes"])
    for key in ("decode", "ttft_int8", "avx2_ttft_fp32", "vision_best", "decode_int8_openvino_int8"):
        assert again[key] == result["metrics"][key]
