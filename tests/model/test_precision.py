"""Formats by layer: patterns, budgets of bits, and what report says."""

import models
import pytest
import torch

import qvl_model
from qvl_model.quantization import bits, precision
from qvl_model.quantization.modules import PackedLinear


def _formats(model):
    return {
        name: f"int{module.quantized.bits}"
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
    }


def _stored(model):
    """Bits per weight of all quantised layers, from the memory of their buffers."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    stored = sum(8 * tensor.nbytes for layer in layers for tensor in layer.buffers(recurse=False))
    return stored / sum(layer.in_features * layer.out_features for layer in layers)


def test_patterns_come_before_parts_and_the_last_one_first():
    weights = {"text": "int4", "*.down_proj": "int8", "*.layers.0.*": None, "lm_head": "int8"}
    model = qvl_model.accelerate(models.stock_model("small"), weights=weights, bits=4.625)
    found = _formats(model)
    assert not any(".layers.0." in name or "visual" in name for name in found) and found.pop("lm_head") == "int8"
    assert {name: value for name, value in found.items() if value == "int8"}.keys() == {
        f"model.language_model.layers.{i}.mlp.down_proj" for i in (1, 2)
    }
    assert type(model.model.language_model.layers[0].mlp.down_proj).__mro__[1] is torch.nn.Linear
    with torch.no_grad():
        assert model(**models.inputs([5])).logits.isfinite().all()
    qvl_model.accelerate(model, weights=weights)  # once more changes nothing
    assert _formats(model) == {"lm_head": "int8", **found}


def test_int4_is_a_mix_unless_a_pattern_names_it():
    model = qvl_model.accelerate(models.stock_model("small"), weights="int4")
    found = _formats(model)
    sizes = {name: m.in_features * m.out_features for name, m in model.named_modules() if name in found}
    raised = sum(sizes[name] for name in found if found[name] == "int8")
    assert 0 < raised <= sum(sizes.values()) * (4.85 - 4.625) / (8 - 4.625)
    assert all(value == "int8" for name, value in found.items() if name.endswith(".v_proj"))
    assert set(_formats(qvl_model.accelerate(models.stock_model("small"), weights={"*": "int4"})).values()) == {"int4"}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("budget", [4.32, 4.85, 6.0, 8.0])
def test_a_budget_is_used_and_kept(budget, calibrated):
    model = models.stock_model("small")
    inputs = models.inputs([9, (1, 4, 6), 3], seed=3) if calibrated else None
    qvl_model.accelerate(model, weights="int4", group=64, bits=budget, calibration=inputs)
    found = _formats(model)
    sizes = {name: m.in_features * m.out_features for name, m in model.named_modules() if name in found}
    raised = sum(sizes[name] for name in found if found[name] == "int8")
    low = 4.3125
    average = low + (8 - low) * raised / sum(sizes.values())
    assert average <= budget
    if budget == 4.32:
        assert raised <= 0.05 * sum(sizes.values())
    elif budget < 8:
        assert raised and (not calibrated or average > budget - 0.5)
    qvl_model.accelerate(model, weights="int4", group=64, bits=budget)  # once more changes nothing
    assert _formats(model) == found


def test_the_fixed_rule():
    sizes = {f"model.language_model.layers.{i}.mlp.down_proj": 10 for i in range(6)}
    sizes |= {f"model.language_model.layers.{i}.self_attn.v_proj": 1 for i in range(6)}
    sizes |= {f"model.language_model.layers.{i}.mlp.up_proj": 10 for i in range(6)}
    sizes |= {"model.visual.blocks.0.mlp.linear_fc2": 10, "lm_head": 50}
    total = sum(sizes.values())

    def raised(weights):
        chosen = precision.mixed(sizes, 4.25, 4.25 + 3.75 * weights / total + 1e-9, None)
        return {name.removeprefix("model.language_model.layers.") for name in chosen}

    values = {f"{i}.self_attn.v_proj" for i in range(6)}
    edges = {f"{i}.mlp.{kind}_proj" for i in (0, 5) for kind in ("up", "down")}
    assert raised(6) == values
    assert raised(46) == values | edges
    assert raised(66) == values | edges | {"1.mlp.down_proj", "4.mlp.down_proj"}
    assert raised(total) == values | edges | {f"{i}.mlp.down_proj" for i in range(1, 5)}


def test_errors_decide_per_added_bit():
    sizes = {"a.up_proj": 100, "b.up_proj": 100, "c.up_proj": 50, "d.up_proj": 100}
    errors = {"a.up_proj": 0.1, "b.up_proj": 0.4, "c.up_proj": 0.3}  # none reached d
    assert precision.mixed(sizes, 4.25, 4.25 + 3.75 * 150 / 350, errors) == {"c.up_proj", "b.up_proj"}
    assert precision.mixed(sizes, 4.25, 8, errors) == {"a.up_proj", "b.up_proj", "c.up_proj"}


def test_report_lists_bits_by_kind_and_their_average():
    model = qvl_model.accelerate(
        models.stock_model("small"), weights={"text": "int4", "*.v_proj": "int8"}, group=64, bits=4.32
    )
    table = {(row.kind, row.format): row for row in qvl_model.report(model).bits}
    assert table["v_proj", "int8"].layers == 3 and table["q_proj", "int4 in groups of 64"].layers == 3
    assert table["q_proj", "int4 in groups of 64"].bits == pytest.approx(4 + (16 + 8) / 64)
    assert bits.average(list(table.values())) == pytest.approx(_stored(model))
    assert f"bits per weight: {_stored(model):.2f} on average" in str(qvl_model.report(model))
    assert not qvl_model.report(models.stock_model("small")).bits


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": {"*.no_such": "int8"}}, ValueError, "matches no linear layer"),
        ({"weights": {"*.q_proj": "int3"}}, ValueError, "is no format"),
        ({"weights": {"texts": "int8"}}, ValueError, "patterns of layer names"),
        ({"weights": "int4", "bits": 4.1}, ValueError, "bits=4.1 is less"),
        ({"weights": "int4", "bits": 9}, ValueError, "above 4 and at most 8"),
        ({"weights": "int4", "bits": "5"}, TypeError, "must be a number"),
        ({"weights": "int8", "bits": 5}, ValueError, "weights makes none"),
        ({"bits": 5}, ValueError, "weights makes none"),
    ],
)
def test_what_cannot_be(options, error, message):
    model = models.stock_model("small")
    types = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        qvl_model.accelerate(model, **options)
    assert types == [type(module) for module in model.modules()]


def test_gate_and_up_have_one_format():
    sizes = {f"{i}.{kind}_proj": 10 for i in range(3) for kind in ("gate", "up", "down")}
    errors = {name: 0.1 for name in sizes} | {"0.up_proj": 0.5, "1.gate_proj": 0.9, "1.up_proj": 0.0}
    for weights in range(0, 91, 5):
        chosen = precision.mixed(sizes, 4.25, 4.25 + 3.75 * weights / 90 + 1e-9, errors)
        assert all((f"{i}.gate_proj" in chosen) == (f"{i}.up_proj" in chosen) for i in range(3))
    assert precision.mixed(sizes, 4.25, 4.25 + 3.75 * 20 / 90 + 1e-9, errors) == {"1.gate_proj", "1.up_proj"}
