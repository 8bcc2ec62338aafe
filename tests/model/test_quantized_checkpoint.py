"""Quantised models on disk: saving, loading, and refused files."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from models import inputs, stock_model
from qvl_models import plain_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3VLForConditionalGeneration as StockModel

import qvl_model
from qvl_kernels import quantization
from qvl_model import cli, digits
from qvl_model.quantization import checkpoint as quantized_checkpoint
from qvl_model.quantization import convert
from qvl_model.quantization.modules import PackedEmbedding, PackedLinear

FORMATS = ["int8", "int4", {"text": "int4", "lm_head": "int8"}, {"vision": "int4"}]
FAMILIES = {
    "qwen3_vl": (lambda: stock_model("small"), qvl_model.Qwen3VLForConditionalGeneration),
    "untied": (lambda: stock_model("untied_bias"), qvl_model.Qwen3VLForConditionalGeneration),
    "qvl": (lambda: plain_model("mlp"), qvl_model.QVLForConditionalGeneration),
}


def _quantised(weights="int8", **options):
    return qvl_model.accelerate(stock_model("small"), weights=weights, **options)


@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_comes_back_as_it_was(tmp_path, family, weights):
    make, model_class = FAMILIES[family]
    model = qvl_model.accelerate(make(), weights=weights, group=32)
    model.save_pretrained(tmp_path / "packed")
    again = model_class.from_pretrained(tmp_path / "packed")
    assert [type(module) for module in again.modules()] == [
        type(module) for module in model.modules()
    ] and not again.training
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = (dict(getattr(one, kind)()) for one in (model, again))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert all(mine[name].dtype == theirs[name].dtype and theirs[name].device.type == "cpu" for name in mine)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    again.save_pretrained(tmp_path / "twice")
    assert (load_file(tmp_path / "twice" / "packed.safetensors").keys()) == load_file(
        tmp_path / "packed" / "packed.safetensors"
    ).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_the_same(tmp_path, family):
    import qvl_models

    make, model_class = FAMILIES[family]
    model = qvl_model.accelerate(make(), weights={"text": "int8", "vision": "int4", "lm_head": "int4"})
    model.save_pretrained(tmp_path / "packed")
    again = model_class.from_pretrained(tmp_path / "packed")
    batch = qvl_models.inputs(7, 4) if family == "qvl" else inputs([5, (1, 4, 6), 3], [14])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(*(one.generate(**batch, max_new_tokens=5, do_sample=False) for one in (model, again)))


def test_what_is_written(tmp_path):
    _quantised({"text": "int4", "vision": "int8", "lm_head": "int8"}, bits=4.625).save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"] and config["dtype"] == "float32"
    section = config["quantization_config"]
    assert len(section.pop("id")) == 16
    assert section == {
        "quant_method": "qvl",
        "version": 2,
        "weights": {"text": "int4", "vision": "int8", "lm_head": "int8"},
        "group": 32,
    }
    with safe_open(tmp_path / "packed" / "packed.safetensors", "pt") as stream:
        names = set(stream.keys())
    layer = "model.language_model.layers.0"
    assert {
        f"{layer}.mlp.up_proj.weight_values",
        f"{layer}.mlp.up_proj.weight_scales",
        f"{layer}.self_attn.q_norm.weight",
    } <= names
    # Tied: the rows of the head and of the embedding are stored once.
    assert len({"lm_head.weight_values", "model.language_model.embed_tokens.weight_values"} & names) == 1
    assert not any(name.endswith(("lm_head.weight", "embed_tokens.weight", "up_proj.weight")) for name in names)
    assert os.listdir(tmp_path) == ["packed"]  # nothing temporary is left


def _with_zero_points(model, **options):
    """Every int4 layer of the model rounded again, with these options."""
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.quantized.bits == 4:
            module._take(quantization.quantize(module.dequantize(), 4, **options), module.weight)
    for embedding, head in convert.tied_pairs(model):
        embedding.weight = head.weight
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"group": 32, "zero_points": True},
        {"group": 128, "zero_points": True, "scale_dtype": torch.float16},
        {"group": 64, "scale_dtype": torch.float16},
        {"group": 64},
    ],
    ids=["zeros", "zeros-fp16", "fp16", "symmetric"],
)
def test_version_2_is_written_where_version_1_does_not_do(tmp_path, options):
    model = _with_zero_points(_quantised({"text": "int4", "vision": "int8"}), **options)
    model.save_pretrained(tmp_path / "packed")
    section = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert section["version"] == (1 if options == {"group": 64} else 2) and section["group"] == options["group"]
    again = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "packed")
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert any(name.endswith("weight_zeros") for name in state) == bool(options.get("zero_points"))
    batch = inputs([5, (1, 4, 6), 3], [14])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(*(one.generate(**batch, max_new_tokens=4, do_sample=False) for one in (model, again)))
    _quantised("int8").save_pretrained(tmp_path / "packed")  # over the other one
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["version"] == 1


def test_zero_points_of_another_shape_are_refused(tmp_path):
    _with_zero_points(_quantised("int4"), group=32, zero_points=True).save_pretrained(tmp_path)
    zeros = f"{NAME}.weight_zeros"
    _tensors(lambda t: t.update({zeros: t[zeros][:, :-1].contiguous()}))(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit its config\.json.*weight\.zeros"):
        qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)


def test_tied_rows_stay_one_tensor(tmp_path):
    _quantised("int8").save_pretrained(tmp_path)
    model = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    embedding = model.get_input_embeddings()
    assert (
        type(embedding) is PackedEmbedding
        and embedding.weight_values.data_ptr() == model.lm_head.weight_values.data_ptr()
    )
    _quantised({"vision": "int8"}).save_pretrained(tmp_path)
    model = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    assert model.get_input_embeddings().weight is model.lm_head.weight


def test_arguments_of_from_pretrained(tmp_path):
    load = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained
    _quantised("int8").save_pretrained(tmp_path)
    model, info = load(
        tmp_path,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        device_map="cpu",
        output_loading_info=True,
        local_files_only=True,
    )
    assert (
        model.dtype == model.config.dtype == torch.bfloat16
        and model.config._attn_implementation == "eager"
        and not info["missing_keys"]
    )
    assert (
        model.lm_head.weight_scales.dtype == torch.float32
        and model.get_input_embeddings()(torch.tensor([3])).dtype == torch.bfloat16
    )
    with pytest.raises(TypeError, match="not max_memory, quantization_config"):
        load(tmp_path, quantization_config={}, max_memory={})
    load(tmp_path, quantization_config=None, max_memory=None)
    load(tmp_path, quantization_config=convert.section_of(tmp_path))
    with pytest.raises(ValueError, match="one device"):
        load(tmp_path, device_map={"model": "cpu", "lm_head": "meta"})


def test_what_is_not_quantised_is_saved_as_ever(tmp_path):
    model = qvl_model.accelerate(stock_model("small"))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "packed.safetensors").exists() and type(StockModel.from_pretrained(tmp_path)) is StockModel
    with pytest.raises(ValueError, match="no quantised layers"):
        quantized_checkpoint.save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(TypeError, match="push_to_hub"):
        _quantised().save_pretrained(tmp_path / "other", push_to_hub=True)


def test_restore_cannot_dequantise_what_was_loaded_quantised(tmp_path):
    _quantised("int8").save_pretrained(tmp_path)
    model = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has them quantised"):
        qvl_model.restore(model)
    assert isinstance(model.lm_head, PackedLinear) and qvl_model.is_accelerated(model)


def _tensors(change):
    """Damage: edits the tensors of a directory and keeps its metadata."""

    def damage(directory):
        file = directory / "packed.safetensors"
        with safe_open(file, "pt") as stream:
            metadata = stream.metadata()
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata)

    return damage


def _config(**changes):
    def damage(directory):
        config = json.loads((directory / "config.json").read_text())
        for key, value in changes.items():
            config[key] |= value
        (directory / "config.json").write_text(json.dumps(config))

    return damage


def _cut(directory):
    file = directory / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


NAME = "model.language_model.layers.1.mlp.up_proj"
DAMAGE = {
    "truncated": (_cut, "is damaged"),
    "empty": (lambda directory: (directory / "packed.safetensors").write_bytes(b""), "is damaged"),
    "no tensors": (lambda directory: (directory / "packed.safetensors").unlink(), "has no packed.safetensors"),
    "foreign version": (
        _config(quantization_config={"version": 3}),
        "version 3 of the format, this qvl reads versions 1 and 2",
    ),
    "of another save": (_config(quantization_config={"id": "0" * 16}), "is not the one"),
    "missing": (
        _tensors(lambda t: t.pop(f"{NAME.replace('up_proj', 'down_proj')}.weight_values")),
        r"(?s)has, without a place.*lacks|lacks|without a place",
    ),
    "no scales": (_tensors(lambda t: t.pop(f"{NAME}.weight_scales")), "its scales are missing"),
    "added": (
        _tensors(lambda t: t.update(extra=torch.ones(3))),
        "without a place for it in the model, 1 tensors, such as extra",
    ),
    "short": (
        _tensors(lambda t: t.update({f"{NAME}.weight_values": t[f"{NAME}.weight_values"][:-1].contiguous()})),
        "does not fit its config.json",
    ),
    "dtype": (
        _tensors(lambda t: t.update({f"{NAME}.weight_scales": t[f"{NAME}.weight_scales"].double().half()})),
        "does not fit its config.json",
    ),
    "norm": (
        _tensors(lambda t: t.update({"model.language_model.norm.weight": torch.ones(3)})),
        "in another size than config.json says 1 tensors",
    ),
    "other sizes": (_config(text_config={"hidden_size": 96}), "does not fit its config.json|in another size"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "packed"
    _quantised("int8").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(tmp_path, saved, damage):
    directory = shutil.copytree(saved, tmp_path / "packed")
    spoil, message = DAMAGE[damage]
    spoil(directory)
    before = {file.name: file.stat().st_mtime_ns for file in directory.iterdir()}
    with pytest.raises(ValueError, match=message):
        qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(directory)
    assert {file.name: file.stat().st_mtime_ns for file in directory.iterdir()} == before


def test_a_save_over_another_one(tmp_path, saved):
    """Files are replaced one by one; every state in between is refused, or is the complete old or new model."""
    directory = shutil.copytree(saved, tmp_path / "packed")
    (directory / "tokenizer.json").write_text("{}")
    _quantised("int4").save_pretrained(directory)
    assert (directory / "tokenizer.json").exists()
    model = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(directory)
    assert model.lm_head.quantized.bits == 4
    shutil.copy(saved / "config.json", directory)  # as if killed before the new config came
    with pytest.raises(ValueError, match="cut short"):
        qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(directory)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    model = _quantised("int8")
    monkeypatch.setattr(quantized_checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path / "packed")
    assert os.listdir(tmp_path) == []


KILLED = """
    import sys, torch
    sys.path.insert(0, "tests/helpers")
    import qvl_model
    from models import stock_model
    model = qvl_model.accelerate(stock_model("small"), weights="int8")
    print("ready", flush=True)
    for i in range(10**6):
        model.save_pretrained(f"{sys.argv[1]}/{i}")
"""


def test_killed_while_saving(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    while len(os.listdir(tmp_path)) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = [directory for directory in tmp_path.iterdir() if not directory.name.endswith(".tmp")]
    assert len(found) >= 4
    for directory in found:
        qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(directory)


def test_quantize_and_the_command_line(tmp_path, capsys):
    out = tmp_path / "digits-int4"
    arguments = [
        "quantize",
        "--model",
        str(digits.CHECKPOINT),
        "--weights",
        "text=int4",
        "vision=int8",
        "lm_head=int8",
        "--group",
        "32",
        "--out",
        str(out),
    ]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert "GB of weights" in capsys.readouterr().out
    model = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(out)
    direct = qvl_model.accelerate(
        StockModel.from_pretrained(digits.CHECKPOINT, dtype="auto"),
        weights={"text": "int4", "vision": "int8", "lm_head": "int8"},
        group=32,
    )
    state, expected = model.state_dict(), direct.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert model.dtype == torch.bfloat16
    assert (
        cli.main(
            [
                "generate",
                "--model",
                str(out),
                "--image",
                str(digits.SAMPLE),
                "--prompt",
                "Read the digits from left to right.",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.strip() == "8 6 9"
    assert cli.main(["inspect", str(out)]) == 0
    assert "PackedLinear (int4)" in capsys.readouterr().out
    assert cli.main(["verify", str(out)]) == 0
    verified = capsys.readouterr().out
    assert (
        "capacity is complete" in verified
        and f"{sum(p.numel() for p in StockModel.from_pretrained(digits.CHECKPOINT).parameters()):,}" in verified
    )
    for arguments, message in (
        (["generate", "--model", str(out), "--stock", "--prompt", "x"], "stock transformers cannot run"),
        (["quantize", "--model", str(out), "--out", str(tmp_path / "again")], "is quantised already"),
        (["quantize", "--model", str(digits.CHECKPOINT), "--out", str(out)], "exists"),
        (
            ["quantize", "--model", str(digits.CHECKPOINT), "--weights", "int3", "--out", str(tmp_path / "x")],
            "is no format",
        ),
        (
            ["quantize", "--model", str(digits.CHECKPOINT), "--weights", "int8", "int4", "--out", str(tmp_path / "x")],
            "part=format",
        ),
        (
            ["quantize", "--model", str(digits.CHECKPOINT), "--weights", "head=int8", "--out", str(tmp_path / "x")],
            "names the part 'head'",
        ),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert os.listdir(tmp_path) == ["digits-int4"]


MEMORY = """
    import re, resource, sys, torch
    from pathlib import Path
    import qvl_model
    from qvl_model import pretrained
    from qvl_model.quantization.convert import formats_of

    def resident(field):
        return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    how, weights, source, out, tiny = sys.argv[1:]
    pretrained.quantize(tiny, out + "-tiny", formats_of(weights))  # all code is loaded
    model = None
    if how != "disk":
        model = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    if how == "memory":  # no map of a file
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if how == "disk":
        pretrained.quantize(source, out, formats_of(weights))
    else:
        qvl_model.accelerate(model, weights=weights)
    print(before, resident("VmHWM"), resident("VmRSS"))
"""


def _write_large(directory, sizes):
    """A checkpoint with the same random block in every tensor: fast to write."""
    from transformers import Qwen3VLConfig

    config = Qwen3VLConfig(**sizes)
    with torch.device("meta"):
        model = StockModel(config)
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = (
            block.repeat(-(-parameter.numel() // block.numel()))[: parameter.numel()].view(parameter.shape).clone()
        )
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config.dtype, config.architectures = "bfloat16", ["Qwen3VLForConditionalGeneration"]
    config.save_pretrained(directory)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantised = sum(tensor.numel() for name, tensor in tensors.items() if name in linear or "embed_tokens" in name)
    kept = sum(
        2 * tensor.numel() for name, tensor in tensors.items() if name not in linear and "embed_tokens" not in name
    )
    largest = max(2 * tensor.numel() for tensor in tensors.values())
    return {"int8": quantised + kept, "int4": quantised * 17 // 32 + kept}, largest


def _check_memory(directory, how, weights, final, largest, slack):
    """Peak memory while quantising: resident before, plus quantised weights, plus one tensor; a loaded model frees its
    dense weights.
    """
    source = directory / "source"
    arguments = [how, weights, str(source), str(directory / f"{how}-{weights}"), str(digits.CHECKPOINT)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    before, peak, after = map(int, done.stdout.split())
    if how == "memory":  # quantised weights are at most half of bf16: never more than both forms of one layer
        assert peak <= before + largest + slack and after < before - final // 4
    else:
        assert peak <= before + final[weights] + largest + slack, f"{(peak - before) / 1e6:.0f} MB"


MEDIUM = dict(
    tie_word_embeddings=True,
    text_config=dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=16000,
        tie_word_embeddings=True,
    ),
    vision_config=dict(
        depth=4,
        hidden_size=512,
        intermediate_size=2048,
        num_heads=8,
        out_hidden_size=1024,
        deepstack_visual_indexes=[1],
    ),
)


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    directory = tmp_path_factory.mktemp("memory")
    return directory, *_write_large(directory / "source", MEDIUM)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("how", "weights"),
    [
        ("disk", "int8"),
        *(
            pytest.param(how, weights, marks=pytest.mark.slow)
            for how, weights in (("loaded", "int4"), ("memory", "int8"))
        ),
    ],
)
def test_memory_while_packing(medium, how, weights):
    directory, final, largest = medium
    _check_memory(directory, how, weights, final[weights] if how == "memory" else final, largest, slack=50_000_000)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("how", "weights"), [("disk", "int8"), ("disk", "int4"), ("loaded", "int8")])
def test_memory_of_the_full_size(tmp_path, how, weights):
    from bench.checkpoint_files import FULL_CONFIG

    final, largest = _write_large(tmp_path / "source", copy.deepcopy(FULL_CONFIG))
    _check_memory(tmp_path, how, weights, final, largest, slack=300_000_000)
    if how == "disk":
        start = time.perf_counter()
        qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / f"{how}-{weights}")
        assert time.perf_counter() - start < 10
