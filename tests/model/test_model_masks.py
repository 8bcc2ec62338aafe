"""Attention masks [B, 1, T, S] of the caller: stock's result, or an error where stock raises."""

import copy

import models
import pytest
import torch
from models import assert_close
from transformers import DynamicCache

from qvl_model.compat import CACHE

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3]])
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def _mask(shape, kind):
    mask = torch.zeros(shape, dtype=torch.bool)
    rows, columns = min(6, shape[-2]), min(6, shape[-1])
    mask[..., :rows, :columns] = CAUSAL[:rows, :columns]
    return mask if kind == "bool" else torch.zeros(shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def _logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def _last_token(model, mask):
    """The last of six tokens, the others being in a cache."""
    cache = DynamicCache()
    _logits(model, input_ids=IDS[:, :5], **{CACHE: cache})
    return _logits(model, input_ids=IDS[:, 5:], attention_mask=mask[:, :, -1:], **{CACHE: cache})


@ATTENTION
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 6, 6), (1, 1, 6, 6), (2, 6, 6, 6), (2, 1, 6, 7), (2, 1, 6, 9), (2, 1, 6, 5)], ids=str
)
def test_four_dimensions(shape, kind, attention):
    stock, fast = models.pair("odd", attention=attention)
    mask = _mask(shape, kind)
    for run in (
        lambda model: _logits(model, input_ids=IDS, attention_mask=mask),
        lambda model: _last_token(model, mask),
    ):
        try:
            expected = run(stock)
        except RuntimeError:
            with pytest.raises((RuntimeError, ValueError)):
                run(fast)
        else:
            assert_close(run(fast), expected)


@ATTENTION
def test_a_layer_without_a_mask(attention):
    """sdpa is causal then, and eager attends to everything."""
    stock, fast = (model.model.language_model.layers[0] for model in models.pair("small", attention=attention))
    generator = torch.Generator().manual_seed(1)
    x, angles = torch.randn(2, 6, 64, generator=generator), torch.randn(1, 6, 8, generator=generator).repeat(1, 1, 2)
    for count in (6, 1):
        options = {"position_embeddings": (angles[:, :count].cos(), angles[:, :count].sin()), "attention_mask": None}
        with torch.no_grad():
            assert_close(fast(x[:, :count], **options), stock(x[:, :count], **options))


def test_a_layer_with_another_attention():
    pair = models.pair("small")
    for model in pair:
        attention = model.model.language_model.layers[0].self_attn
        attention.config = copy.deepcopy(attention.config)
        attention.config._attn_implementation = "eager"
    stock, fast = (_logits(model, input_ids=IDS) for model in pair)
    assert_close(fast, stock)
