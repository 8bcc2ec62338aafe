"""Runs of ``generate`` that several files compare: options, streamers, and what two runs must have in common."""

import copy

import torch
from models import assert_close, inputs
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from qvl_model.compat import CACHE

GREEDY = dict(do_sample=False, max_new_tokens=12)
ENDS = dict(eos_token_id=list(range(0, 160, 7)), pad_token_id=0)


def generate(model, batch, **options):
    torch.manual_seed(3)
    return model.generate(**batch, **options)


def same_runs(models, batch, **options):
    """Asserts that tokens, scores, logits and caches agree; returns both outputs."""
    outs = [
        generate(
            model, batch, **copy.deepcopy(options), return_dict_in_generate=True, output_scores=True, output_logits=True
        )
        for model in models
    ]
    stock, ours = outs
    assert torch.equal(ours.sequences, stock.sequences)
    for name in ("scores", "logits"):
        for got, expected in zip(getattr(ours, name), getattr(stock, name), strict=True):
            assert_close(got.clamp(min=-1e4), expected.clamp(min=-1e4))
    for got, expected in zip(ours[CACHE].layers, stock[CACHE].layers, strict=True):
        assert_close(got.keys, expected.keys)
        assert_close(got.values, expected.values)
    assert int(ours[CACHE].get_seq_length()) == int(stock[CACHE].get_seq_length())
    return outs


def logits_of(model, batch=None, **options):
    """Logits of all new tokens, greedy unless options say otherwise."""
    scored = {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(generate(model, batch or inputs([9]), **{**GREEDY, **scored, **options}).logits)


def same_logits(models, *arguments, **options):
    """Asserts that the logits of stock and ours agree; returns stock's."""
    expected, found = (logits_of(model, *arguments, **copy.deepcopy(options)) for model in models)
    assert found.shape == expected.shape
    assert_close(found, expected)
    return expected


def same_cache(ours, stock, strides: bool = True) -> None:
    """Asserts that keys and values agree, and their strides too."""
    for layer, expected in zip(ours.layers, stock.layers):
        for name in ("keys", "values"):
            assert_close(getattr(layer, name), getattr(expected, name))
            assert not strides or getattr(layer, name).stride() == getattr(expected, name).stride()


def filled_cache(model) -> DynamicCache:
    """With the keys and values of five tokens."""
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), **{CACHE: cache})
    return cache


class Tokens(BaseStreamer):
    """Records tokens. From the second new one on it calls ``each`` at every token, and ``once`` at that one only."""

    def __init__(self, each=lambda: None, *, once=lambda: None):
        self.seen, self.ended, self._each, self._once = [], 0, each, once

    def put(self, value):
        self.seen.append(value.tolist())
        if len(self.seen) == 3:  # the first is the prompt
            self._once()
        if len(self.seen) >= 3:
            self._each()

    def end(self):
        self.ended += 1
