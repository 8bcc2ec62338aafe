"""The benchmark itself: statistics, targets, report, and one run on a tiny model."""

import json

import pytest
import torch

from bench import __main__ as command
from bench import report, timing, truth
from bench.checkpoint import RANDOM_KEY, write_random
from bench.client import Worker, WorkerError
from bench.greedy import CONFIGS, tiny_config
from bench.targets import TARGETS, Target, verdict


def test_paired_ratio_cancels_common_noise():
    ratio = timing.paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0])
    assert ratio == {"median": 2.0, "low": 2.0, "high": 2.0}
    with pytest.raises(ValueError, match="as many"):
        timing.paired_ratio([1.0], [])


@pytest.mark.parametrize(
    ("target", "value", "expected"),
    [
        (Target("a", "a", at_least=1.6), 1.6, "pass"),
        (Target("a", "a", at_least=1.6), 1.59, "miss"),
        (Target("a", "a", at_most=1.1), 1.1, "pass"),
        (Target("a", "a", at_most=1.1), 1.11, "miss"),
        (Target("a", "a", at_most=1.1), None, "–"),
    ],
)
def test_verdict(target, value, expected):
    assert verdict(target, value) == expected


def test_targets_are_unique_and_bounded_on_one_side():
    assert len({target.key for target in TARGETS}) == len(TARGETS)
    assert all((target.at_least is None) != (target.at_most is None) for target in TARGETS)
    assert Target("a", "a", at_least=0.8, unit="%").text == "≥ 80 %"


def test_keep_double_leaves_out_casts_to_float32():
    x = torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    with truth.KeepDouble():
        assert x.float().dtype == x.to(torch.float32).dtype == x.to(dtype=torch.float32).dtype == torch.float64
        assert x.to(torch.bfloat16).dtype == torch.bfloat16
    assert x.float().dtype == torch.float32


def test_worker_reports_errors_and_survives_them():
    with Worker("probe") as worker:
        with pytest.raises(WorkerError, match="FileNotFoundError|OSError|not"):
            worker.ask("load", path="/nowhere", accelerated=False, dtype="bf16", image_size=64, long_size=64, text_tokens=66)
        assert worker.ask("bandwidth", bytes=1 << 22, repeats=1) > 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random checkpoint with the tokenizer that the default one has."""
    text, vision, _ = CONFIGS[-1]
    config = {key: value for key, value in tiny_config(text, vision).items() if not key.endswith("token_id")}
    config["text_config"]["vocab_size"] = 2048
    return write_random(tmp_path_factory.mktemp("bench") / "tiny", config)


def test_random_checkpoint_says_so_and_is_repeatable(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config[RANDOM_KEY] is True
    vocabulary = {token["content"]: token["id"] for token in json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]}
    assert config["image_token_id"] == vocabulary["<|image_pad|>"]
    keys = ("tie_word_embeddings", "text_config", "vision_config")
    again = write_random(tmp_path / "again", {key: config[key] for key in keys})
    assert (again / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_end_to_end_on_a_tiny_model(checkpoint, tmp_path, capsys):
    arguments = ["--model", str(checkpoint), "--image-size", "64", "--long-size", "96", "--rounds", "2", "--tokens", "4",
                 "--no-accuracy", "--output", str(tmp_path), "--name", "tiny"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "decode" in printed and "random" in printed
    assert (tmp_path / "tiny.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "tiny.json").read_text())
    expected = {target.key for target in TARGETS if not target.needs_all}
    assert expected <= result["metrics"].keys()
    assert result["sizes"]["text_tokens"] == 66
    assert result["sizes"]["visual_tokens"] * 4 == result["sizes"]["patches"]
    assert result["metrics"]["greedy_fp32"]["value"] == 1.0
    assert not result["raw"]["fallbacks"]

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\nafter\n")
    report.write_readme(result, readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| ") > len(expected)


def test_missing_checkpoint_is_a_clear_message(tmp_path):
    with pytest.raises(SystemExit, match="config.json"):
        command.main(["--model", str(tmp_path)])
