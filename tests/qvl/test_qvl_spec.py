"""The conformance table names existing things and measured numbers; and requirements that no other test covers."""

import json
import re
from pathlib import Path

from qvl_models import plain_model
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "qvl.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.split("## Measured")[0].splitlines()
    if line.startswith("|")
]
ROWS = [row for row in ROWS if row[0] != "specification" and set(row[0]) != {"-"}]


def test_no_row_is_empty():
    assert len(ROWS) >= 70
    assert not [row for row in ROWS if len(row) != 3 or not all(row)]
    assert not [row for row in ROWS if not re.search(r"`tests/", row[2])]


def test_files_and_tests_exist():
    for name in re.findall(r"`((?:qvl_model|qvl_kernels|csrc|tests|bench|docs)/[\w/.-]+)", TEXT):
        assert (ROOT / name).is_file(), f"docs/qvl.md names {name}"
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT):
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), flags=re.MULTILINE), (
            f"docs/qvl.md names {file}::{test}"
        )


def test_numbers_are_those_of_the_result_file():
    result = json.loads((ROOT / "bench" / "results" / "zen5-qvl.json").read_text())
    options, versions, metrics, precisions = (
        result["options"],
        result["machine"]["versions"],
        result["metrics"],
        result["accuracy"]["precisions"],
    )

    def ratio(key: str) -> str:
        digits = 3 if key.startswith(("peak_rss", "error")) else 2
        return f"{metrics[key]['value']:.{digits}f}×"

    def row(name: str, key: str) -> str:
        bf16, int8 = metrics[key], metrics[f"{key}_int8"]
        return f"| {name} | {bf16['stock']} | {bf16['ours']} | {ratio(key)} | {int8['ours']} | {ratio(f'{key}_int8')} |"

    exact = [
        f"{100 * precisions[name][key]:.2f} %"
        for name, key in (("bf16", "exact_stock"), ("bf16", "exact_ours"), ("int8", "exact_ours"))
    ]
    facts = [
        row("decode", "decode"),
        row("first token, image included", "ttft"),
        row("peak RSS", "peak_rss"),
        row("peak RSS after two images of 1,024 × 1,024 pixels", "peak_rss_long"),
        row("error against fp32, all logits of the prompt", "error_bf16_full"),
        f"{ratio('decode')} decode, {ratio('ttft')} first token (below)",
        f"int8 weights, peak RSS {ratio('peak_rss_int8')} stock's (below); with bf16 weights it is "
        f"{ratio('peak_rss')}.",
        f"error {ratio('error_bf16_full')} the stock model's (below)",
        f"answers {exact[0]} of {result['accuracy']['questions']:,} held-out questions exactly, accelerated "
        f"{exact[1]} (bf16), {exact[2]} (int8)",
        f"{result['machine']['cores']} cores of an {result['machine']['cpu']} (Zen 5)",
        f"torch {versions['torch'].split('+')[0]}, transformers {versions['transformers']}, one image of "
        f"{options['image_size']} × "
        f"{options['image_size']} pixels and {options['text_tokens']} tokens",
        f"medians of {options['rounds']} pairs",
    ]
    assert (
        result["model"]["description"] == "random weights, qvl-2b preset"
        and options["packed"]
        and options["long_size"] == 1024
    )
    assert not [fact for fact in facts if fact not in TEXT]
    assert set(re.findall(r"[\d.]+×", TEXT)) <= set(re.findall(r"[\d.]+×", " ".join(facts))), (
        "a ratio that no result file has"
    )
    table = [line for line in TEXT.split("## Measured")[1].splitlines() if line.startswith("|")][2:]
    assert set(table) == {fact for fact in facts if fact.startswith("|")}


def test_sizes_are_those_of_the_preset():
    parameters = 2_159_034_376  # as test_qvl_config.py counts them
    assert f"{parameters:,} parameters" in TEXT and f"{2 * parameters / 1e9:.1f} GB of bf16 weights" in TEXT
    assert f"{2 * parameters / 1e9:.1f} GB of safetensors in 16 bit, {4 * parameters / 1e9:.1f} GB in fp32" in TEXT


def test_example():
    """The example runs unchanged."""
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)[1], names)
    assert names["tokens"].shape == (2, 11)


def test_every_norm_has_the_epsilon():
    for name in ("mlp", "attention"):
        modules = list(plain_model(name).modules())
        found = {
            getattr(m, "eps", getattr(m, "variance_epsilon", None))
            for m in modules
            if isinstance(m, nn.LayerNorm) or "RMSNorm" in type(m).__name__
        }
        assert found == {1e-12}
