"""output_attentions of QVL, stock and accelerated: weights for any attn_implementation, other results unchanged."""

import functools
import warnings

import pytest
import torch
from models import relative
from qvl_models import CONFIGS, IMAGE, inputs, pad_pixels, pair, plain_model

from qvl_model.compat import CHECKPOINTING

KINDS = ["plain", "accelerated"]


def model_of(name, kind, **options):
    plain, accelerated = pair(name, **options)
    return plain if kind == "plain" else accelerated


def ragged() -> dict:
    generator = torch.Generator().manual_seed(0)
    batch = inputs(7, 3, 5, image=None) | pad_pixels(
        *(torch.randn(3, *size, generator=generator) for size in ((9, 14), (0, 0), (16, 6)))
    )
    batch["input_ids"][:, -2] = IMAGE
    return batch


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sdpa_gives_the_weights_of_eager(name, kind):
    model, batch = model_of(name, kind), ragged()
    before = model(**batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(**batch, output_attentions=True)
    expected = plain_model(name, attention="eager")(**batch, output_attentions=True)
    seen = batch["attention_mask"].bool()
    assert relative(out.logits[seen], expected.logits[seen]) < 2e-5
    assert len(out.attentions) == model.config.num_hidden_layers and len(out.cross_attentions) == len(
        model.config.cross_attention_layers
    )
    for kinds in ("attentions", "cross_attentions"):
        for weights, wanted in zip(getattr(out, kinds), getattr(expected, kinds), strict=True):
            weights, wanted = weights.transpose(1, 2)[seen], wanted.transpose(1, 2)[seen]
            assert torch.allclose(weights, wanted, atol=1e-5)
    assert not any(weights[1].any() for weights in out.cross_attentions) and all(
        weights[0].any() for weights in out.cross_attentions
    )
    after = model(**batch)
    assert torch.equal(after.logits, before) and after.attentions is None and after.cross_attentions is None


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_other_calls_at_the_same_time_see_nothing_of_it(kind):
    """Model, config and modules do not change during the call; hooks on the modules are called."""
    model, seen = model_of("mlp", kind), []
    layer = model.model.language_model.layers[1]
    expected = model(**inputs(6)).logits

    def look(*_):
        configs = (model.config, layer.self_attn.config, layer.fusion.attn.config)
        seen.append([config._attn_implementation for config in configs])
        if len(seen) == 1:
            assert torch.equal(model(**inputs(6)).logits, expected)

    for module in (layer.self_attn, layer.fusion.attn, layer.self_attn.q_proj):
        module.register_forward_hook(look)
    model(**inputs(6), output_attentions=True)
    assert len(seen) == 6 and all(found == ["sdpa"] * 3 for found in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_of_generated_tokens(kind):
    model = model_of("attention", kind)
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    out = model.generate(**inputs(5, 4), **options, output_attentions=True)
    assert torch.equal(out.sequences, model.generate(**inputs(5, 4), **options).sequences)
    for step, weights in enumerate(out.attentions):
        assert [w.shape for w in weights] == [(2, 4, 5 if step == 0 else 1, 5 + step)] * 3
        assert all(torch.allclose(w[0].sum(-1), torch.ones(4, w.shape[2])) for w in weights)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_mask_of_four_dimensions(kind):
    model, batch = model_of("mlp", kind), inputs(6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    mask[..., 4, 2] = False
    expected = model(**{**batch, "attention_mask": mask}).logits
    out = model(**{**batch, "attention_mask": mask}, output_attentions=True)
    assert relative(out.logits, expected) < 2e-5 and not any(
        weights[..., ~mask[0, 0]].any() for weights in out.attentions
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_weights_beside_them(kind, reentrant):
    model = model_of("mlp", kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    batch = ragged()
    labels = batch["input_ids"].clone()
    labels[:, :5] = -100  # tokens after padding depend on padding, where the formulas may differ
    grads = []
    for recording in (False, True):
        model.zero_grad()
        model(**batch, labels=labels, output_attentions=recording).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    assert all(relative(one, other) < 1e-4 for one, other in zip(*grads))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["self_attn", "fusion.attn"])
def test_a_replaced_forward_without_weights_is_an_error(kind, place):
    model = model_of("mlp", kind)
    module = model.model.language_model.layers[1].get_submodule(place)
    module.forward = functools.partial(type(module).forward, module)
    expected = model(**inputs(6)).logits
    with pytest.raises(RuntimeError, match="returns no weights.*attn_implementation"):
        model(**inputs(6), output_attentions=True)
    assert torch.equal(model(**inputs(6)).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_a_row_without_image_in_fp16(kind, attention):
    """Large scores: with every key masked all would be -inf, and the softmax NaN."""
    options = dict(attention=attention, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, batch = model_of("attention", kind, dtype=torch.float16, **options).train(), ragged()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "fusion.attn.q_norm" in key or "fusion.attn.k_norm" in key:
                parameter.mul_(6)
    batch["pixel_values"] = batch["pixel_values"].half()
    for recording in (False, True):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], output_attentions=recording).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
