"""The installed transformers version: both names of the cache argument work, and qvl causes no deprecation warning."""

import contextlib
import inspect
import logging
import warnings

import pytest
import qvl_models
import torch
from models import assert_close, inputs, pair
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from qvl_model.compat import CACHE, CACHE_NAMES

OLDER = CACHE_NAMES[1]


@contextlib.contextmanager
def no_deprecation():
    """Fails on any deprecation warning from Python or transformers' log."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = transformers_logging.get_logger("transformers")
    transformers_logging.get_logger("transformers").warning_once.__func__.cache_clear()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", DeprecationWarning)
            yield
    finally:
        logger.removeHandler(handler)
    assert not [message for message in said if "deprecated" in message]


def _models(family):
    if family == "qvl":
        return qvl_models.pair()[1], qvl_models.inputs(7, 5)
    return pair("small")[1], inputs([5, (1, 4, 4), 2], [3])


@pytest.mark.parametrize("family", ["qwen3-vl", "qvl"])
def test_nothing_of_ours_is_deprecated(family):
    model, batch = _models(family)
    with no_deprecation():
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        model.generate(**batch, max_new_tokens=3, num_beams=2)
        out = model.train()(**batch, labels=batch["input_ids"])
        out.loss.backward()
        with torch.no_grad():
            model.eval()(**batch, **{CACHE: DynamicCache()})


@pytest.mark.parametrize("name", CACHE_NAMES if CACHE == CACHE_NAMES[0] else [CACHE])
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["qwen3-vl", "qvl"])
def test_both_names_of_the_cache(family, name):
    model, batch = _models(family)
    ids = torch.tensor([[3, 4]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1:]
        first = model(input_ids=ids[:, :1], use_cache=True)
        assert_close(model(input_ids=ids[:, 1:], **{name: first[name]}).logits, expected)
        assert first[name] is getattr(first, name) and first.get(name) is first[CACHE] and name in first
        assert first[CACHE].get_seq_length() == 2
        layer, mask = model.model.language_model.layers[0], None
        x = torch.randn(1, 3, layer.input_layernorm.weight.shape[0])
        angles = torch.randn(1, 3, layer.self_attn.head_dim)
        results = [
            layer(x, position_embeddings=(angles.cos(), angles.sin()), attention_mask=mask, **{key: DynamicCache()})
            for key in (name, CACHE)
        ]
        assert torch.equal(*results)


def test_both_names_in_outputs_of_qvl():
    model, batch = _models("qvl")
    out = model(**batch, use_cache=True)
    assert (
        out.cache is out.past_key_values is out["cache"] is out["past_key_values"]
        and "cache" in out
        and "past_key_values" in out
    )
    assert len(out.to_tuple()) == len(out.keys())


def test_signatures_have_the_name_of_this_version():
    ours, _ = _models("qwen3-vl")
    layer = ours.model.language_model.layers[0]
    for module in (layer, layer.self_attn):
        theirs = [p for p in inspect.signature(type(module).__mro__[1].forward).parameters if p in CACHE_NAMES]
        assert [p for p in inspect.signature(module.forward).parameters if p in CACHE_NAMES] == theirs == [CACHE]
    assert CACHE in inspect.signature(_models("qvl")[0].forward).parameters
