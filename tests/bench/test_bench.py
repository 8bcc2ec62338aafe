"""The benchmark itself: statistics, targets, report, and one run on a tiny model."""

import json

import pytest
import torch

from bench import __main__ as command
from bench import fp64_reference, plan, report, timing
from bench.__main__ import RESULTS
from bench.checkpoint import RANDOM_KEY, cached_checkpoint, write_random
from bench.client import Worker, WorkerError
from bench.families import FAMILIES
from bench.greedy import CONFIGS, tiny_config
from bench.targets import Target, verdict
from qvl_model.qvl import QVLConfig
from qvl_model.qvl.presets import PRESETS


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


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_targets_are_unique_and_bounded_on_one_side(family):
    assert len({(target.key, target.needs) for target in family.targets + family.notes}) == len(
        family.targets + family.notes
    )
    assert all((target.at_least is None) != (target.at_most is None) for target in family.targets)
    assert all(target.text == verdict(target, 1.0) == "" for target in family.notes)
    assert Target("a", "a", at_least=0.8, unit="%").text == "≥ 80 %"
    assert Target("a", "a", at_least=0.9999, unit="cosine").text == "≥ 0.9999"


def test_keep_double_leaves_out_casts_to_float32():
    x = torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    with fp64_reference.KeepDouble():
        assert x.float().dtype == x.to(torch.float32).dtype == x.to(dtype=torch.float32).dtype == torch.float64
        assert x.to(torch.bfloat16).dtype == torch.bfloat16
    assert x.float().dtype == torch.float32


def test_rounds_end_when_their_time_is_up(monkeypatch):
    assert list(plan._rounds_in_time(3)) == [0, 1, 2] and not list(plan._rounds_in_time(0))
    clock = iter([0.0, 10.0, plan.ROW_SECONDS + 1.0])
    monkeypatch.setattr(plan.time, "monotonic", lambda: next(clock))
    assert list(plan._rounds_in_time(5)) == [0, 1]


def test_worker_reports_errors_and_survives_them():
    with Worker("probe") as worker:
        with pytest.raises(WorkerError, match="FileNotFoundError|OSError|not"):
            worker.ask(
                "load",
                path="/nowhere",
                variant="stock",
                dtype="bf16",
                image_size=64,
                long_size=64,
                text_tokens=66,
                batch=2,
            )
        assert worker.ask("bandwidth", bytes=1 << 22, repeats=1) > 0


def _sizes(family: str) -> dict:
    """A tiny config with room for the tokenizer that the default one has."""
    if family == "qvl":
        return {key: value for key, value in PRESETS["qvl-tiny"].items() if key != "image_token_id"}
    text, vision, _ = CONFIGS[-1]
    config = {key: value for key, value in tiny_config(text, vision).items() if not key.endswith("token_id")}
    config["text_config"]["vocab_size"] = 2048
    return config


# A run of the other family takes as long, over the same code.
@pytest.fixture(scope="module", params=["qwen3-vl", pytest.param("qvl", marks=pytest.mark.slow)])
def checkpoint(request, tmp_path_factory):
    """A tiny random checkpoint."""
    return write_random(tmp_path_factory.mktemp("bench") / "tiny", FAMILIES[request.param], _sizes(request.param))


def test_random_checkpoint_says_so_and_is_repeatable(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config[RANDOM_KEY] is True and config["dtype"] == "bfloat16"
    vocabulary = {
        token["content"]: token["id"]
        for token in json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]
    }
    assert config["image_token_id"] == vocabulary["<|image_pad|>"]
    family = config["model_type"].replace("_", "-")
    again = write_random(tmp_path / "again", FAMILIES[family], _sizes(family))
    assert (again / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_qvl_at_full_size_is_the_preset():
    config = FAMILIES["qvl"].config(**FAMILIES["qvl"].full_config())
    assert config.image_token_id == 6
    config.image_token_id = 151655
    assert config.to_dict() == QVLConfig.from_preset("qvl-2b").to_dict()
    assert cached_checkpoint(FAMILIES["qvl"]) != cached_checkpoint(FAMILIES["qwen3-vl"])


def test_end_to_end_on_a_tiny_model(checkpoint, tmp_path, capsys):
    arguments = [
        "--model",
        str(checkpoint),
        "--image-size",
        "64",
        "--long-size",
        "96",
        "--rounds",
        "2",
        "--tokens",
        "4",
        "--no-accuracy",
        "--output",
        str(tmp_path),
        "--name",
        "tiny",
    ]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "tiny.json").read_text())
    family = report.family_of_result(result)
    assert family.title in printed and "decode" in printed and "random" in printed
    assert (tmp_path / "tiny.png").stat().st_size > 10_000
    expected = {target.key for target in family.targets + family.notes if not target.needs}
    assert expected <= result["metrics"].keys()
    assert result["sizes"]["text_tokens"] == 66
    assert result["sizes"]["visual_tokens"] * (4 if family.name == "qwen3-vl" else 1) == result["sizes"]["patches"]
    assert result["metrics"]["greedy_fp32"]["value"] == 1.0
    assert not result["raw"]["fallbacks"]
    assert all(len(values) == 2 and min(values) > 0 for values in result["raw"]["peaks"].values())
    for row in ("decode", "vision", "ttft", "ttft_long", "prefill"):  # far below the roofline: the model is tiny
        metric = result["metrics"][row]
        assert 0 < metric["share"] < 1 < metric["limit"] and metric["floors"].keys() == {"ours", "stock"}
    assert "of it" in printed and "not slower" not in printed

    assert report.markdown_table(result).count("\n| ") >= len(expected)


@pytest.mark.slow
def test_quantised_weights_are_further_variants_of_a_run(tmp_path):
    sizes = {
        **_sizes("qvl"),
        "vocab_size": 16384,
    }  # so that decoder and head hold most of the weights, as at full size
    model = write_random(tmp_path / "tiny", FAMILIES["qvl"], sizes)
    options = plan.Options(
        str(model),
        "qvl",
        rounds=2,
        tokens=4,
        image_size=64,
        long_size=64,
        probe_bytes=1 << 22,
        accuracy=False,
        packed=True,
    )
    steps = []
    result = plan.run(options, steps.append)
    assert len(steps) == plan.steps(options)
    size = result["raw"]["bytes_per_token"]
    assert size["stock"] == size["ours"] and size["int8"] < 0.6 * size["ours"] and size["int4"] < 0.7 * size["int8"]
    values = {key: metric["value"] for key, metric in result["metrics"].items()}
    assert {"decode_int8", "ttft_int4", "peak_rss_int4", "decode_share_int8", "batch", "batch_int4"} <= values.keys()
    assert values["layer_cosine_int8"] > 0.9999 and values["layer_cosine_int4"] > 0.999
    assert values["error_bf16_full"] < values["error_bf16_full_int8"] < values["error_bf16_full_int4"] < 100
    assert result["raw"]["times"]["decode"].keys() == set(options.variants)
    for row in ("decode", "vision", "ttft", "prefill", "batch"):
        for suffix, variant in (("", "ours"), ("_int8", "int8"), ("_int4", "int4")):
            metric = result["metrics"][row + suffix]
            assert metric["kernels"] in ("qvl", "pytorch") and metric["floors"][variant] > 0
    assert "not slower" in report.columns({"options": vars(options), **result})


class _Engine:
    """Takes the place of another engine: stock in a worker of ours, or one that does not start."""

    version = "1.0"

    def __init__(self, name: str, prompts: tuple[str, ...], model: str, works: bool = True) -> None:
        self.name, self.prompts, self.model, self.works = name, prompts, model, works

    def start(self, prompts, threads: int) -> Worker:
        assert prompts.is_file() and threads == torch.get_num_threads()
        if not self.works:
            raise WorkerError("the worker ended\nout of memory")
        worker = Worker(self.name)
        worker.ask(
            "load", path=self.model, variant="stock", dtype="bf16", image_size=64, long_size=64, text_tokens=66, batch=2
        )
        return worker


@pytest.mark.slow
def test_peers_take_turns_with_the_same_weights(tmp_path, monkeypatch):
    model = str(write_random(tmp_path / "tiny", FAMILIES["qwen3-vl"], _sizes("qwen3-vl")))
    peers = [
        _Engine("openvino int8", ("image", "text"), model),
        _Engine("llama.cpp Q4_0", ("text",), model),
        _Engine("openvino int4", (), model, works=False),
    ]
    monkeypatch.setattr(plan, "engines_of", lambda path: [*peers, _Engine("llama.cpp bf16", (), model)])
    monkeypatch.setattr(plan, "prepared", lambda found, show: (found[:3], {"llama.cpp bf16": "no compiler"}))
    options = plan.Options(
        model,
        rounds=2,
        tokens=4,
        image_size=64,
        long_size=64,
        long_pairs=0,
        batch=2,
        probe_bytes=1 << 22,
        accuracy=False,
        packed=True,
        peers=True,
    )
    steps = []
    result = plan.run(options, steps.append)
    assert len(steps) == plan.steps(options) - 1  # one engine could not be prepared
    assert result["raw"]["peers"]["skipped"] == {"llama.cpp bf16": "no compiler", "openvino int4": "out of memory"}
    metrics = {key: metric for key, metric in result["metrics"].items() if "openvino" in key or "llama" in key}
    assert metrics.keys() == {
        "decode_int8_openvino_int8",
        "prefill_int8_openvino_int8",
        "ttft_int8_openvino_int8",
        "decode_int8_llama.cpp_Q4_0",
        "decode_int4_llama.cpp_Q4_0",
        "prefill_int8_llama.cpp_Q4_0",
        "prefill_int4_llama.cpp_Q4_0",
        "prefill_int8_openvino_best",
        "prefill_int8_llama.cpp_best",
    }
    assert all(metric["low"] <= metric["value"] <= metric["high"] for metric in metrics.values())
    shown = {row[0] for row in report.rows({"options": vars(options), **result})}
    assert {
        "decode, int4, against llama.cpp Q4_0",
        "text prefill, int8, against llama.cpp's best",
        "decode, int8",
        "decode, batch of 8, bf16",
    } <= shown


def test_missing_and_foreign_checkpoints_are_a_clear_message(checkpoint, tmp_path):
    with pytest.raises(SystemExit, match="config.json"):
        command.main(["--model", str(tmp_path)])
    name = json.loads((checkpoint / "config.json").read_text())["model_type"].replace("_", "-")
    other = next(family for family in FAMILIES if family != name)
    with pytest.raises(SystemExit, match=f"is a {name} model, not one of {other}"):
        command.main(["--model", str(checkpoint), "--family", other])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="is a None model, not one of qwen3-vl or qvl"):
        command.main(["--model", str(tmp_path)])


def test_the_committed_results_can_be_shown(capsys):
    for file in RESULTS.glob("*.json"):
        result = json.loads(file.read_text())
        if "metrics" in result:
            assert report.markdown_table(result).count("pass") > 5
