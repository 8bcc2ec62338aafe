"""accelerate and restore of QVL: the same results, object and weights; stock code for layers that are not eligible."""

import copy
import io
import pickle

import pytest
import torch
from models import assert_all_fused, fused_calls, relative
from qvl_models import IMAGE, inputs, pad_pixels, pair, plain_model
from torch import nn
from transformers import AutoModelForImageTextToText

import qvl_model
from qvl_model import capacity
from qvl_model.modules import qvl as qvl_modules

NAMES = ["mlp", "attention"]


def images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pad_pixels(*(torch.randn(3, *size, generator=generator) for size in sizes))


BATCHES = {
    "one": inputs(6),
    "left": inputs(9, 4),
    "right": inputs(9, 4, padding="right"),
    "text": inputs(5, 8, image=None),
    "one token": inputs(1),
    "ragged": inputs(7, 3, 5, image=None) | images((9, 14), (0, 0), (16, 6)),
    "long": inputs(70, image=(40, 36)),
}


@torch.no_grad()
def run(model, **batch):
    return model(**batch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_fp32_is_the_plain_model(name, batch):
    plain, accelerated = pair(name)
    expected = run(plain, **batch, output_hidden_states=True)
    with fused_calls(accelerated) as calls:
        out = run(accelerated, **batch, output_hidden_states=True)
    assert_all_fused(calls, vision="pixel_values" in batch)
    seen = batch["attention_mask"].bool()
    assert relative(out.logits[seen], expected.logits[seen]) < 2e-5
    assert relative(out.pooler_output, expected.pooler_output) < 2e-5
    for state, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert relative(state[seen], wanted[seen]) < 2e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_against_the_fp64_reference_is_no_larger_than_the_plain_models(name, dtype):
    """Summed over weights and inputs to average out noise."""
    errors = {"plain": 0.0, "accelerated": 0.0}
    for seed in range(6):
        plain, accelerated = pair(name, dtype, seed=seed)
        batch = inputs(9, 6, image=(18, 23), seed=seed)
        seen = batch["attention_mask"].bool()
        golden = run(copy.deepcopy(plain).double(), **batch).logits[seen]
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        rounded = run(
            copy.deepcopy(plain).double(), **{**batch, "pixel_values": batch["pixel_values"].double()}
        ).logits[seen]
        assert relative(rounded, golden) < 0.05
        for kind, model in (("plain", plain), ("accelerated", accelerated)):
            errors[kind] += relative(run(model, **batch).logits[seen], rounded) ** 2
    assert errors["accelerated"] ** 0.5 <= 1.1 * errors["plain"] ** 0.5, errors


def test_everything_is_replaced_and_reported():
    for name in NAMES:
        plain, accelerated = pair(name)
        before, after = qvl_model.report(plain), qvl_model.report(accelerated)
        assert not before.accelerated and after.accelerated and before.replaced == after.replaced
        kinds = {kind for _, kind, _ in after.replaced}
        assert {
            "QVLDecoderLayer",
            "QVLCrossAttention",
            "QVLVisionBlock",
            "QVLPatchEmbed",
            "QVLConnectorMLP",
            "Linear",
        } <= kinds
        assert ("QVLConnectorAttention" in kinds) == (name == "attention")
        assert not [row for row in after.kept if "not a class" in row[2]]
        assert all(
            type(module).__name__ == type(other).__name__
            for module, other in zip(plain.modules(), accelerated.modules())
        )


@pytest.mark.parametrize("name", NAMES)
def test_restore_gives_the_plain_model_back(name):
    plain = plain_model(name)
    model = copy.deepcopy(plain)
    tensors = {key: value.data_ptr() for key, value in model.state_dict(keep_vars=True).items()}
    assert qvl_model.accelerate(model) is model and qvl_model.is_accelerated(model)
    assert qvl_model.accelerate(model) is model  # again
    state = model.state_dict(keep_vars=True)
    assert {key: value.data_ptr() for key, value in state.items()} == tensors
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in state.items())
    run(model, **inputs(5))
    assert qvl_model.restore(model) is model and not qvl_model.is_accelerated(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(run(model, **inputs(5)).logits, run(plain, **inputs(5)).logits)


@pytest.mark.parametrize("part", ["model", "model.language_model", "model.visual"])
def test_parts_alone(part):
    plain, batch = plain_model(), inputs(5)
    module = plain.get_submodule(part)
    arguments = {
        "model": batch,
        "model.language_model": {"input_ids": batch["input_ids"]},
        "model.visual": {"pixel_values": batch["pixel_values"]},
    }[part]
    expected = run(module, **arguments)[0]
    out = run(qvl_model.accelerate(copy.deepcopy(module)), **arguments)[0]
    assert relative(out, expected) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_files(tmp_path, name):
    plain, model = pair(name)
    batch = inputs(6, 4)
    expected = run(model, **batch).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert qvl_model.is_accelerated(other) and torch.equal(run(other, **batch).logits, expected)
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
        assert torch.equal(run(model, **batch).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert not qvl_model.is_accelerated(loaded) and torch.equal(run(loaded, **batch).logits, run(plain, **batch).logits)


@pytest.mark.parametrize("break_it", ["dtype", "meta", "quantised"])
def test_a_refused_model_stays_as_it_was(break_it):
    model = plain_model()
    if break_it == "dtype":
        model.model.connector.double()
    elif break_it == "meta":
        model.model.connector.to("meta")
    else:
        model.config.quantization_config = {"quant_method": "other"}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="accelerate"):
        qvl_model.accelerate(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    plain, accelerated = pair(name)
    batch = inputs(7, 5, image=None) | images((9, 14), (16, 6))
    batch["input_ids"][:, -2] = IMAGE
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for model in (plain, accelerated):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        out = model(**batch, labels=labels)
        out.loss.backward()
        losses.append(out.loss)
    assert relative(losses[1], losses[0]) < 1e-5
    for (key, mine), theirs in zip(accelerated.named_parameters(), plain.parameters()):
        assert mine.grad is not None and relative(mine.grad, theirs.grad) < 1e-4, key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_drawn_in_training_mode_even_without_gradients(name, which):
    model = qvl_model.accelerate(
        plain_model(name, **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, which: 0.4})
    ).train()
    batch = inputs(6)
    assert not torch.equal(run(model, **batch).logits, run(model, **batch).logits)
    assert torch.equal(run(model.eval(), **batch).logits, run(model, **batch).logits)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_training(name):
    plain, accelerated = pair(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    grads = []
    for model in (plain, accelerated):
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs(6), labels=inputs(6)["input_ids"]).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(relative(mine, theirs) < 1e-4 for mine, theirs in zip(grads[1], grads[0]))


@pytest.mark.parametrize("name", NAMES)
def test_eager_attentions(name):
    plain, accelerated = pair(name, attention="eager")
    batch = inputs(6, 4)
    expected, out = (run(model, **batch, output_attentions=True) for model in (plain, accelerated))
    for kind in ("attentions", "cross_attentions"):
        one, other = getattr(out, kind), getattr(expected, kind)
        assert len(one) == len(other) > 0 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other))


HOOKED = [
    "model.language_model.layers.1.fusion",
    "model.language_model.layers.1.fusion.attn",
    "model.language_model.layers.1.fusion.attn.q_proj",
    "model.language_model.layers.1.fusion.norm",
    "model.language_model.layers.1.fusion.dropout",
    "model.language_model.layers.1.dropout",
    "model.language_model.layers.1.mlp",
    "model.language_model.layers.2.self_attn.k_norm",
    "model.visual.blocks.0.attn.qkv",
    "model.visual.patch_embed.proj",
    "model.visual.position_embed",
    "model.connector.mlp",
    "model.connector.mlp.act_fn",
    "lm_head",
]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_are_called_and_heeded(name):
    plain, accelerated = pair("mlp")
    calls = {plain: 0, accelerated: 0}

    def double(model, output):
        calls[model] += 1
        return (
            tuple(2 * x if isinstance(x, torch.Tensor) else x for x in output)
            if isinstance(output, tuple)
            else 2 * output
        )

    for model in (plain, accelerated):
        model.get_submodule(name).register_forward_hook(lambda module, args, output, model=model: double(model, output))
    expected, out = (run(model, **inputs(6)).logits for model in (plain, accelerated))
    assert calls[accelerated] == calls[plain] > 0 and relative(out, expected) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_adapters(name):
    import peft

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv", "fc1"], init_lora_weights=False)
    base = plain_model(name)
    adapted = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    accelerated = qvl_model.accelerate(copy.deepcopy(adapted))
    expected = run(adapted, **inputs(6)).logits
    assert relative(expected, run(base, **inputs(6)).logits) > 0.1
    assert relative(run(accelerated, **inputs(6)).logits, expected) < 2e-5
    assert relative(run(accelerated.merge_and_unload(), **inputs(6)).logits, expected) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_traced_models(name):
    plain, accelerated = pair(name)
    compiled = torch.compile(accelerated, backend="eager")
    assert relative(run(compiled, **inputs(6)).logits, run(plain, **inputs(6)).logits) < 2e-5


def test_weights_may_be_replaced_between_calls():
    plain, accelerated = pair("mlp")
    run(accelerated, **inputs(6))
    for model in (plain, accelerated):
        fusion = model.model.language_model.layers[1].fusion
        torch.manual_seed(0)
        fusion.attn.q_proj.weight = nn.Parameter(torch.randn_like(fusion.attn.q_proj.weight))
        fusion.gate.data = torch.tensor([-1.5])
        model.model.language_model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.randn(50, 72) / 8)
    assert relative(run(accelerated, **inputs(6)).logits, run(plain, **inputs(6)).logits) < 2e-5


def test_autocast():
    plain, accelerated = pair("attention")
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = (run(model, **inputs(6)).logits for model in (plain, accelerated))
    assert relative(out, expected) < 0.03


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights, limit", [("int8", 0.03), ("int4", 0.4)])
def test_quantised_weights_and_back(tmp_path, name, weights, limit):
    """Random weights are the worst case of int4; the kernels' own tests check quantised weights."""
    plain_model(name).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    batch = inputs(9, 5)
    expected = run(model, **batch).logits
    qvl_model.accelerate(model, weights=weights)
    quantised = {key for key, _, ours in qvl_model.report(model).replaced if "Packed" in ours}
    wanted = {"lm_head", "model.language_model.layers.2.mlp.up_proj", "model.visual.blocks.0.attn.qkv"}
    assert wanted | {key for key in quantised if "fusion.attn" in key or "connector" in key} <= quantised and any(
        "fusion.attn.k_proj" in key for key in quantised
    )
    out = run(model, **batch).logits
    assert 0 < relative(out, expected) < limit
    tokens = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, 12) and torch.equal(tokens[:, 9], out[:, -1].argmax(-1))
    restored = run(qvl_model.restore(model), **batch).logits
    assert not qvl_model.is_accelerated(model) and torch.equal(restored, expected)


def test_capacity_is_complete_before_and_after():
    for name in NAMES:
        for model in pair(name):
            facts = capacity.verify(model).facts
            assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_replacements_are_subclasses_of_the_same_name():
    assert all(
        issubclass(ours, plain) and ours.__name__ == plain.__name__ for plain, ours in qvl_modules.REPLACEMENTS.items()
    )
