"""Input scales from calibration: accuracy on models with outliers, and that nothing else changes."""

import copy
import pickle

import models
import pytest
import qvl_models
import torch
from models import relative
from transformers import Qwen3VLForConditionalGeneration

import qvl_model
from bench import outliers
from qvl_model.quantization import calibration_set, scaling
from qvl_model.quantization.modules import PackedLinear

ROWS = ([9, (1, 4, 6), 3], [14], [3, (1, 2, 2), (1, 8, 6)])
FAMILIES = ("small", "odd", "untied_bias", "qvl mlp", "qvl attention")


def stock_model(name, dtype=torch.float32, **options):
    if name.startswith("qvl"):
        return qvl_models.plain_model(name.split()[1], dtype, **options)
    return models.stock_model(name, dtype, **options)


def batch_of(name, seed=0):
    return qvl_models.inputs(9, 14, 5, seed=seed) if name.startswith("qvl") else models.inputs(*ROWS, seed=seed)


def logits(model, name, seed=0):
    with torch.no_grad():
        return model(**batch_of(name, seed)).logits


def calibrated(name, weights="int8", model=None):
    """A calibrated copy; the inputs are others than those that tests compare."""
    model = copy.deepcopy(stock_model(name) if model is None else model)
    return qvl_model.accelerate(model, weights=weights, calibration=[batch_of(name, seed) for seed in (10, 11, 12)])


def dense_logits(model, name):
    """Of a stock model with the dequantised weights, which rounds no activations."""
    state = {key: value for key, value in model.state_dict().items() if "_scales" not in key and "_values" not in key}
    for key, module in model.named_modules():
        if isinstance(module, PackedLinear):
            state[f"{key}.weight"] = module.dequantize()
    dense = stock_model(name)
    dense.load_state_dict(state, strict=False)
    assert not dense.state_dict().keys() - state.keys() - {"model.language_model.embed_tokens.weight"}
    return logits(dense, name)


def injected(name, **options):
    return outliers.inject(stock_model(name, **options))


@pytest.mark.parametrize("name", FAMILIES)
def test_injected_outliers_do_not_change_the_function(name):
    stock = stock_model(name, torch.float64)
    assert relative(logits(outliers.inject(copy.deepcopy(stock)), name), logits(stock, name)) <= 1e-14


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_calibration_takes_outliers_away(name, weights):
    """Errors of all logits against the dense model: with outliers, calibrated, close to those without outliers."""
    golden = logits(stock_model(name), name)

    def error(model):
        return relative(logits(model, name), golden)

    plain = error(qvl_model.accelerate(stock_model(name), weights=weights))
    hard = error(qvl_model.accelerate(injected(name), weights=weights))
    found = error(calibrated(name, weights, injected(name)))
    print(f"{name} {weights}: without outliers {plain:.4f}, with {hard:.4f}, calibrated {found:.4f}")
    assert found <= 1.2 * plain and found < 0.9 * hard


@pytest.mark.parametrize("name", FAMILIES)
def test_unfolding_gives_the_dense_weights_back(name):
    stock = injected(name)
    model = calibrated(name, model=stock)
    folded, before, dense = logits(model, name), copy.deepcopy(model.state_dict()), dense_logits(model, name)
    with pytest.raises(KeyError), scaling.unfolded(model):
        assert relative(dense_logits(model, name), dense) < 1e-5
        assert relative(logits(model, name), folded) < 0.02  # other roundings of activations
        state = model.state_dict()
        for key, value in stock.state_dict().items():
            if key in state:
                assert torch.allclose(state[key], value, rtol=1e-6, atol=0), key
        raise KeyError
    assert torch.equal(logits(model, name), folded)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_norms_in_16_bits_lose_nothing():
    stock = injected("small", dtype=torch.bfloat16)
    model = calibrated("small", model=stock)
    with pytest.raises(KeyError), scaling.unfolded(model):
        state = model.state_dict()
        for key, value in stock.state_dict().items():
            assert key not in state or key.endswith("bias") or torch.equal(state[key], value), key
        raise KeyError
    scale = model.model.language_model.layers[0].self_attn.q_proj.folded_scales
    assert scale.dtype == torch.float32 and (scale.log2() % 1 != 0).any()


def test_every_fold_of_a_model_is_found():
    model = models.stock_model("odd")
    found = scaling.folds_of(dict(model.named_modules()))
    text, visual = model.model.language_model.layers, model.model.visual
    assert len(found) == 4 * len(text) + 3 * len(visual.blocks) + 1 + len(visual.deepstack_merger_list)
    for name, layers, fusions in (("mlp", 4, 2), ("attention", 3, 2)):
        model = qvl_models.plain_model(name)
        found = scaling.folds_of(dict(model.named_modules()))
        connector = 3 * len(model.model.connector.layers) if name == "attention" else 0
        expected = 4 * layers + 2 * fusions + 3 * len(model.model.visual.blocks) + connector + 1
        assert len(found) == expected


def test_the_same_inputs_give_the_same_model():
    first, again = (calibrated("small", model=injected("small")).state_dict() for _ in range(2))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def test_copies_pickles_and_state_dicts():
    model = calibrated("small", model=injected("small"))
    expected = logits(model, "small")
    other = calibrated("small", model=injected("small", seed=0))
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(logits(copied, "small"), expected)
        for record in scaling.records_of(copied):
            record.unfold()
        assert relative(logits(copied, "small"), expected) < 1e-4
    assert torch.equal(logits(model, "small"), expected)  # the copies have their own norms
    half = copy.deepcopy(model).to(torch.bfloat16)
    scales = half.model.language_model.layers[0].self_attn.q_proj.folded_scales
    assert scales.dtype == torch.float32 and logits(half, "small").dtype == torch.bfloat16


def _saved(directory, model):
    model.save_pretrained(directory)
    return Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)


def test_restore_gives_all_weights_back(tmp_path):
    stock = _saved(tmp_path, injected("small"))
    fast = calibrated("small", model=_saved(tmp_path, stock))
    assert not torch.equal(
        fast.state_dict()["model.visual.blocks.0.norm1.weight"], stock.model.visual.blocks[0].norm1.weight
    )
    qvl_model.restore(fast)
    state, expected = fast.state_dict(), stock.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert [type(m) for m in fast.modules()] == [type(m) for m in stock.modules()]
    assert calibration_set.recorded(fast) is None and not scaling.records_of(fast)


def test_a_refused_restore_leaves_the_model_as_it_was(tmp_path):
    stock = _saved(tmp_path, injected("small"))
    with torch.no_grad():
        stock.model.language_model.layers[1].mlp.up_proj.weight.mul_(2)
    fast = calibrated("small", model=stock)
    before, expected = copy.deepcopy(fast.state_dict()), logits(fast, "small")
    with pytest.raises(ValueError, match="was not quantised from the checkpoint"):
        qvl_model.restore(fast)
    after = fast.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(fast, "small"), expected)


def test_a_saved_model_is_the_same_and_says_what_it_was_calibrated_with(tmp_path):
    import json

    model = calibrated("small", "int4", injected("small"))
    model = qvl_model.accelerate(model)
    directory = tmp_path / "saved"
    model.save_pretrained(directory)
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert section["calibration"]["set"] == "own" and len(section["calibration"]["sha256"]) == 64
    loaded = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(directory)
    assert torch.equal(logits(loaded, "small"), logits(model, "small"))
    assert calibration_set.recorded(loaded) == section["calibration"]
    assert {id(r) for r in scaling.records_of(loaded)} and all(r.folded() for r in scaling.records_of(loaded))
    assert len(scaling.records_of(loaded)) == len(scaling.records_of(model))


def _with_adapter(model, seed=3):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    kinds = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "qkv", "linear_fc1"]
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=1, target_modules=kinds, init_lora_weights=False)).eval()


def test_adapters_of_the_dense_model_are_exact_on_a_calibrated_one(tmp_path):
    from peft import PeftModel

    stock = injected("small")
    fast, plain = calibrated("small", model=stock), qvl_model.accelerate(copy.deepcopy(stock), weights="int8")
    base = relative(logits(fast, "small"), logits(stock, "small"))
    untouched = relative(logits(plain, "small"), logits(stock, "small"))
    tuned = _with_adapter(copy.deepcopy(stock))
    tuned.save_pretrained(tmp_path)
    assert relative(logits(tuned, "small"), logits(stock, "small")) > 0.05
    loaded = PeftModel.from_pretrained(fast, tmp_path).eval()
    error = relative(logits(loaded, "small"), logits(tuned, "small"))
    assert error < 3 * base < untouched
    merged = copy.deepcopy(loaded)
    merged.merge_adapter()
    assert relative(logits(merged, "small"), logits(tuned, "small")) < 3 * base
    merged.unmerge_adapter()
    assert torch.equal(logits(merged, "small"), logits(loaded, "small"))
    whole = loaded.merge_and_unload()
    assert relative(logits(whole, "small"), logits(tuned, "small")) < 3 * base
    qvl_model.accelerate(whole)
    assert all(record.folded() for record in scaling.records_of(whole))
    assert relative(logits(whole, "small"), logits(tuned, "small")) < 3 * base


def test_adapters_that_are_there_already():
    stock = injected("small")
    tuned, other = _with_adapter(copy.deepcopy(stock)), _with_adapter(copy.deepcopy(stock))
    qvl_model.accelerate(tuned, weights="int8", calibration=batch_of("small", 10))
    assert relative(logits(tuned, "small"), logits(other, "small")) < 0.08
    assert not any(record.folded() for record in scaling.records_of(tuned) if record.index.numel() == 64)


def test_modules_to_save_train_the_dense_weight():
    from peft import LoraConfig, get_peft_model

    fast = calibrated("small", model=injected("small"))
    expected = logits(fast, "small")
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["o_proj"])
    tuned = get_peft_model(fast, settings).eval()
    kept = tuned.base_model.model.model.language_model.layers[0].self_attn.o_proj.modules_to_save["default"]
    assert type(kept) is torch.nn.Linear and not set(kept._buffers) & set(scaling.BUFFERS)
    assert relative(logits(tuned, "small"), expected) < 0.04


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ("other", TypeError, "calibration takes None"),
        (3, TypeError, "calibration takes None"),
        ([], ValueError, "holds no inputs"),
        ("default", ValueError, "needs the processor of the checkpoint"),
        ([{"input_ids": torch.zeros(1, 3, dtype=torch.long), "foreign": 1, "pixel_values": 2}], AttributeError, "int"),
    ],
)
def test_a_failed_calibration_leaves_the_model_as_it_was(calibration, error, message):
    model = stock_model("small").train()
    before, types = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        qvl_model.accelerate(model, weights="int8", calibration=calibration)
    assert types == [type(module) for module in model.modules()] and model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_calibration_needs_dense_weights_to_quantise():
    with pytest.raises(ValueError, match="give weights too"):
        qvl_model.accelerate(stock_model("small"), calibration=batch_of("small"))
    fast = qvl_model.accelerate(stock_model("small"), weights="int8")
    with pytest.raises(ValueError, match="found no dense layers"):
        qvl_model.accelerate(fast, weights="int8", calibration=batch_of("small"))
    part = stock_model("small").model.language_model
    with pytest.raises(ValueError, match="is for whole models"):
        qvl_model.accelerate(part, weights="int8", calibration="default")


def test_activations_that_are_not_finite_are_refused():
    stock = stock_model("small")
    with torch.no_grad():
        stock.model.language_model.embed_tokens.weight[5] = torch.inf
    ids = torch.full((1, 4), 5)
    with pytest.raises(ValueError, match="not finite"):
        qvl_model.accelerate(stock, weights={"text": "int8"}, calibration={"input_ids": ids})


def test_a_part_that_stays_dense_has_no_scales():
    model = injected("small")
    expected = copy.deepcopy(model.model.visual.state_dict())
    qvl_model.accelerate(model, weights={"text": "int8"}, calibration=batch_of("small", 10))
    assert all(torch.equal(expected[key], value) for key, value in model.model.visual.state_dict().items())
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 3 * 7
