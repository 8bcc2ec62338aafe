"""QVL: every change of what is kept between calls takes effect in the next call."""

import pytest
import torch
from changes import WEIGHTS, hooked
from models import assert_close, relative
from qvl_models import inputs, pair
from torch import nn
from transformers import DynamicCache

from qvl_model.compat import CACHE

BATCH = inputs(8, 5)
LAYER, BLOCK = "model.language_model.layers.1", "model.visual.blocks.1"


def _run(model) -> list[torch.Tensor]:
    """Logits of a prompt with images, of a loop over tokens after it, and of generate."""
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        steps = [model(**BATCH, **{CACHE: cache}).logits]
        for i in range(3):
            mask = torch.cat((BATCH["attention_mask"], torch.ones(2, i + 1, dtype=torch.long)), 1)
            token = torch.full((2, 1), 11 * i + 3)
            steps.append(model(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits)
        out = model.generate(
            **BATCH, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return [steps[0], torch.cat(steps[1:], 1), torch.stack(out.logits)]


def _eps(model):
    text, visual = model.model.language_model, model.model.visual
    norms = (text.layers[1].input_layernorm, text.layers[2].self_attn.k_norm, text.layers[1].fusion.norm, text.norm)
    for norm in norms:
        norm.variance_epsilon = 0.3
    visual.blocks[1].norm1.eps = visual.blocks[1].norm2.eps = visual.norm.eps = 0.3


def _scaling(model):
    text, visual = model.model.language_model, model.model.visual
    for attention in (text.layers[1].self_attn, text.layers[1].fusion.attn, visual.blocks[0].attn):
        attention.scaling *= 2


def _activation(model):
    model.model.language_model.layers[1].mlp.act_fn = nn.ReLU()
    model.model.visual.blocks[1].mlp.act_fn = nn.ReLU()


CHANGES = {
    **WEIGHTS,
    "eps": _eps,
    "scaling": _scaling,
    "activation": _activation,
    "hook on a norm": hooked(f"{LAYER}.post_attention_layernorm", f"{LAYER}.fusion.norm", f"{BLOCK}.norm1"),
    "hook on a linear": hooked(f"{LAYER}.self_attn.o_proj", f"{LAYER}.fusion.attn.v_proj", f"{BLOCK}.mlp.linear_fc1"),
    "hook before a linear": hooked(f"{LAYER}.mlp.gate_proj", f"{BLOCK}.attn.qkv", pre=True),
    "hook on an attention": hooked(f"{LAYER}.self_attn", f"{LAYER}.fusion.attn", f"{BLOCK}.attn"),
    "hook on a layer": hooked(LAYER, BLOCK),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_counts(name):
    stock, ours = pair()
    before = _run(ours)
    for model in (stock, ours):
        CHANGES[name](model)
    for got, expected, earlier in zip(_run(ours), _run(stock), before, strict=True):
        assert_close(got, expected)
        assert relative(expected, earlier) > 1e-4
