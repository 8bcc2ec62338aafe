"""accelerate, restore, report and the drop-in class: their guarantees about the model object."""

import copy
import json

import models
import pytest
import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

import qvl_model

IMAGES = ([5, (1, 2, 2), 3, (1, 34, 18), 4],)  # one row, two images of different sizes


def _snapshot(model):
    return {name: (id(module), type(module), sorted(module.__dict__)) for name, module in model.named_modules()}


def test_state_dict_is_bit_identical_before_during_and_after():
    model = models.stock_model()
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = models.inputs(*IMAGES)
    for change in (qvl_model.accelerate, qvl_model.restore):
        change(model)
        with torch.no_grad():
            model(**inputs)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers


def test_restore_gives_the_stock_model_back():
    model = models.stock_model()
    before, inputs = _snapshot(model), models.inputs(*IMAGES)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert qvl_model.accelerate(model) is model and qvl_model.is_accelerated(model)
        model(**inputs)
        assert qvl_model.restore(model) is model and not qvl_model.is_accelerated(model)
        assert torch.equal(model(**inputs).logits, expected)
    assert _snapshot(model) == before


@pytest.mark.parametrize("part", ["model", "model.language_model", "model.visual"])
def test_parts_of_a_model(part):
    model = models.stock_model()
    inner = model.get_submodule(part)
    before, inputs = _snapshot(model), models.inputs(*IMAGES)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert qvl_model.accelerate(inner) is inner and qvl_model.is_accelerated(inner)
        with models.fused_calls(model) as calls:
            models.assert_close(model(**inputs).logits, expected)
    for op, other in (("decoder_layer", "model.visual"), ("vision_block", "model.language_model")):
        assert calls.fused[op] == (0 if part == other else calls.expected[op])
    qvl_model.restore(inner)
    assert _snapshot(model) == before


def test_accelerate_twice_is_once():
    model = qvl_model.accelerate(models.stock_model())
    before = _snapshot(model)
    assert _snapshot(qvl_model.accelerate(model)) == before


def test_save_and_load_with_stock(tmp_path):
    ours = qvl_model.accelerate(models.stock_model())
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3VLForConditionalGeneration"]
    again = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    assert type(again) is Qwen3VLForConditionalGeneration and not qvl_model.is_accelerated(again)
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_drop_in_class(tmp_path):
    stock = models.stock_model()
    stock.save_pretrained(tmp_path)
    ours = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(ours, Qwen3VLForConditionalGeneration) and qvl_model.is_accelerated(ours)
    inputs = models.inputs(*IMAGES)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(**inputs).logits, stock(**inputs).logits, rtol=1e-3, atol=1e-4)
    ours.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    ours, info = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert qvl_model.is_accelerated(ours) and "missing_keys" in info


def _quantised(model):
    model.config.quantization_config = {"quant_method": "bitsandbytes"}


def _quantised_dynamically(model):
    model.model.language_model.layers[1].mlp = torch.ao.quantization.quantize_dynamic(
        model.model.language_model.layers[1].mlp, {nn.Linear}
    )


def _holds_values_elsewhere(model):
    model.lm_head._parameters["weight"] = models.Elsewhere(model.lm_head.weight.detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.ao.quantization
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "Qwen3VLForConditionalGeneration"),
        (lambda: models.stock_model().to("meta"), ValueError, "meta device"),
        (lambda: models.stock_model().double(), ValueError, "float64"),
        (lambda: _with(models.stock_model(), _quantised), ValueError, "quantised"),
        (lambda: _with(models.stock_model(), _quantised_dynamically), ValueError, "quantised"),
        (lambda: _with(models.stock_model(), _holds_values_elsewhere), ValueError, "lm_head.weight: Elsewhere"),
    ],
    ids=["class", "meta", "dtype", "quantised", "quantised dynamically", "tensor subclass"],
)
def test_failure_leaves_the_model_as_it_was(make, error, message):
    model = make()
    before = _snapshot(model)
    with pytest.raises(error, match=message):
        qvl_model.accelerate(model)
    assert _snapshot(model) == before


def _with(model, change):
    change(model)
    return model


def test_late_meta_weight_changes_nothing():
    model = models.stock_model()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"))
    before = _snapshot(model)
    with pytest.raises(ValueError, match="meta"):
        qvl_model.accelerate(model)
    assert _snapshot(model) == before


def test_unknown_weight_format():
    model = models.stock_model()
    with pytest.raises(ValueError, match="is no format"):
        qvl_model.accelerate(model, weights="int3")
    assert not qvl_model.is_accelerated(model)


def test_report():
    model = models.stock_model()
    planned = qvl_model.report(model)
    assert not planned.accelerated and "would replace" in str(planned)
    done = qvl_model.report(qvl_model.accelerate(model))
    assert done.accelerated and [row[:2] for row in done.replaced] == [row[:2] for row in planned.replaced]
    replaced = {name for name, _, _ in done.replaced}
    assert {
        "lm_head",
        "model.language_model.layers.4.mlp.down_proj",
        "model.visual.blocks.3",
        "model.visual.patch_embed",
    } <= replaced
    assert all(reason for _, _, reason in done.kept)
    modules = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert replaced | {name for name, _, _ in done.kept} == modules


def test_accelerated_after_deepcopy_of_stock():
    stock = models.stock_model()
    ours = qvl_model.accelerate(copy.deepcopy(stock))
    assert qvl_model.is_accelerated(ours) and not qvl_model.is_accelerated(stock)
