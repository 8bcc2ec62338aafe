"""Quantised checkpoints through transformers' own from_pretrained: the Auto classes, pipelines, quantization_config."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from models import inputs, stock_model
from transformers import AutoModel, AutoModelForImageTextToText
from transformers import Qwen3VLForConditionalGeneration as StockModel

import qvl_model
from qvl_model.quantization import convert
from qvl_model.quantization.modules import PackedEmbedding, PackedLinear

FORMATS = ["int8", "int4", {"text": "int4", "lm_head": "int8"}, {"vision": "int4"}]


@pytest.fixture(params=["small", "untied_bias"])
def saved(request, tmp_path):
    """A function: a directory of quantised weights, and the model that wrote it."""

    def save(weights="int8", **options):
        model = qvl_model.accelerate(stock_model(request.param), weights=weights, **options)
        model.save_pretrained(tmp_path / "quantised")
        return tmp_path / "quantised", model

    return save


def _same(model, expected):
    assert [type(module) for module in model.modules()] == [type(module) for module in expected.modules()]
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = (dict(getattr(one, kind)()) for one in (model, expected))
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
            assert tensor.requires_grad == theirs[name].requires_grad, name
    batch = inputs([5, (1, 4, 6), 3], [14])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected(**batch).logits)
    assert torch.equal(*(one.generate(**batch, max_new_tokens=4, do_sample=False) for one in (model, expected)))


@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("loader", [AutoModelForImageTextToText, StockModel])
def test_loads_the_model_that_was_saved(saved, loader, weights, recwarn):
    path, _ = saved(weights)
    model, info = loader.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    expected = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(path)
    _same(model, expected)
    assert model.config.to_dict() == expected.config.to_dict()
    assert qvl_model.is_accelerated(model) and not model.training
    assert not hasattr(model, "hf_quantizer") and not getattr(model, "is_quantized", False)
    tied = convert.tied_pairs(expected)
    assert len(convert.tied_pairs(model)) == len(tied)
    assert not [str(warning.message) for warning in recwarn if "qvl" in str(warning.message)]


def test_what_is_loaded_is_mapped_saved_and_moved_as_ever(saved, tmp_path):
    path, model = saved("int8")
    loaded = AutoModelForImageTextToText.from_pretrained(path)
    layer = loaded.model.language_model.layers[0].mlp.up_proj
    with open("/proc/self/maps") as maps:
        areas = [line.split() for line in maps if line.rstrip().endswith("packed.safetensors")]
    bounds = [[int(end, 16) for end in area[0].split("-")] for area in areas]
    assert any(begin <= layer.weight_values.data_ptr() < end for begin, end in bounds)
    loaded.save_pretrained(tmp_path / "again")
    _same(AutoModelForImageTextToText.from_pretrained(tmp_path / "again"), model)
    half = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == torch.bfloat16 and half.lm_head.weight_scales.dtype == torch.float32
    with pytest.raises(ValueError, match="one device"):
        AutoModelForImageTextToText.from_pretrained(path, device_map={"model": "cpu", "lm_head": "meta"})


def test_calibrated(saved):
    path, model = saved("int4", calibration=[inputs([5, (1, 4, 6), 3])])
    loaded = AutoModelForImageTextToText.from_pretrained(path)
    _same(loaded, model)
    loaded.save_pretrained(path.parent / "again")
    sections = [convert.section_of(one)["calibration"] for one in (path, path.parent / "again")]
    assert sections[0] == sections[1]


def test_the_model_below_the_head(saved):
    path, model = saved("int8")
    loaded = AutoModel.from_pretrained(path)
    batch = inputs([5, (1, 4, 6), 3])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, model.model(**batch).last_hidden_state)
    assert qvl_model.is_accelerated(loaded)


def test_damage_is_refused(saved):
    path, _ = saved("int8")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["id"] = "0" * 16
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not the one"):
        AutoModelForImageTextToText.from_pretrained(path)
    config["quantization_config"]["version"] = 3
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 3 of the format"):
        AutoModelForImageTextToText.from_pretrained(path)
    config["quantization_config"]["version"] = 1
    (path / "config.json").write_text(json.dumps(config))
    (path / "packed.safetensors").unlink()
    with pytest.raises(ValueError, match="has no packed.safetensors"):
        AutoModelForImageTextToText.from_pretrained(path)


def test_another_shape_than_config_says_is_refused(saved):
    path, _ = saved("int8")
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks .* tensors"):
        AutoModelForImageTextToText.from_pretrained(path)


def test_nothing_is_left_on_another_device_or_in_another_dtype(saved):
    path, _ = saved("int8")
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        model = auto_class.from_pretrained(path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    model = AutoModelForImageTextToText.from_pretrained(path, low_cpu_mem_usage=True, device_map="auto")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_attention_code_of_the_hub_is_refused_before_it_is_fetched(saved):
    path, _ = saved("int8")
    config = json.loads((path / "config.json").read_text())
    config["attn_implementation"] = "some-org/kernel"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="asks for attention code from elsewhere"):
        AutoModelForImageTextToText.from_pretrained(path)
    assert qvl_model.is_accelerated(AutoModelForImageTextToText.from_pretrained(path, attn_implementation="sdpa"))


def test_quantising_while_loading(tmp_path):
    stock_model("small").save_pretrained(tmp_path)
    config = qvl_model.QuantizationConfig({"text": "int4", "vision": "int8"}, bits=5)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config)
    _same(loaded, qvl_model.accelerate(stock_model("small"), weights={"text": "int4", "vision": "int8"}, bits=5))
    assert any(isinstance(module, PackedLinear | PackedEmbedding) for module in loaded.modules())
    settings = {"quant_method": "qvl", "weights": {"text": "int4", "vision": "int8"}, "bits": 5}
    _same(AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=settings), loaded)
    assert repr(config) == "QuantizationConfig(weights={'text': 'int4', 'vision': 'int8'}, group=None, bits=5)"
    with pytest.raises(ValueError, match="bits"):
        qvl_model.QuantizationConfig("int4", bits=1)
    with pytest.raises(ValueError, match="int3"):
        qvl_model.QuantizationConfig("int3")


REGISTERED = """
import sys, torch
import qvl_model
from PIL import Image
from qvl_model import digits, pretrained
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

path = digits.checkpoint("digits")
plain = AutoModelForImageTextToText.from_pretrained(path)
assert type(plain) is stock.Qwen3VLForConditionalGeneration and not qvl_model.is_accelerated(plain)
qvl_model.register()
qvl_model.register()  # twice is once
pretrained.quantize(path, sys.argv[1], {"text": "int8"})
for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    for source in (path, sys.argv[1]):
        model = auto_class.from_pretrained(source, dtype=torch.float32, device_map="cpu")
        assert type(model) is qvl_model.Qwen3VLForConditionalGeneration and qvl_model.is_accelerated(model), source
processor = AutoProcessor.from_pretrained(path)
image = Image.effect_mandelbrot((64, 64), (-2, -2, 1, 1), 20).convert("RGB")
question = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Which digits?"}]}]
expected = None
for source in (path, sys.argv[1]):
    answers = pipeline("image-text-to-text", model=str(source))(text=question, max_new_tokens=4, return_full_text=False)
    text = answers[0]["generated_text"]
    expected = text if expected is None else expected
    assert text and text == expected, (text, expected)
print("done", type(processor).__name__)
"""


def test_register_makes_auto_classes_and_pipelines_accelerated(tmp_path):
    command = [sys.executable, "-c", REGISTERED, str(tmp_path / "int8")]
    done = subprocess.run(command, capture_output=True, text=True)
    if transformers.__version__ == "5.17.0":
        assert "the Auto classes of transformers 5.17.0 keep stock's class" in done.stderr
        return
    assert done.returncode == 0 and done.stdout.split() == ["done", "Qwen3VLProcessor"], done.stderr[-3000:]


def test_without_qvl_there_is_one_clear_error(tmp_path):
    path = tmp_path / "int8"
    qvl_model.accelerate(stock_model("small"), weights="int8").save_pretrained(path)
    code = f"from transformers import AutoModelForImageTextToText as A\nA.from_pretrained({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "no file named model.safetensors" in done.stderr


PROGRAM = """
import sys
import qvl_model
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
print(sys.argv, __name__, qvl_model.is_accelerated(model))
if len(sys.argv) > 2:
    raise RuntimeError("the program's own error")
"""


registers = pytest.mark.skipif(transformers.__version__ == "5.17.0", reason="its Auto classes keep stock's class")


@registers
@pytest.mark.parametrize(("command", "more"), [(["script.py"], []), (["-m", "script"], ["--flag"])], ids=str)
def test_qvl_run(tmp_path, command, more):
    path = tmp_path / "int8"
    qvl_model.accelerate(stock_model("small"), weights="int8").save_pretrained(path)
    (tmp_path / "script.py").write_text("import sibling\n" + PROGRAM)
    (tmp_path / "sibling.py").write_text("")
    qvl = [sys.executable, "-m", "qvl_model.cli", "run", *command, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if "helpers" not in path)}
    done = subprocess.run([*qvl, *more], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "__main__ True" in done.stdout and str(path) in done.stdout, done.stderr
    assert done.returncode == bool(more) and ("the program's own error" in done.stderr) == bool(more)


@registers
def test_qvl_run_takes_installed_commands(capsys):
    from qvl_model import cli

    assert cli.main(["run", "no-such-program"]) == 2
    assert "no-such-program is no command of a package" in capsys.readouterr().err
    for missing in (["missing.py"], ["-m", "missing.module"]):
        assert cli.main(["run", *missing]) == 2
        assert "there is no" in capsys.readouterr().err
    qvl = [sys.executable, "-m", "qvl_model.cli", "run", "transformers", "version"]
    done = subprocess.run(qvl, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
