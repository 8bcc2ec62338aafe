"""KV caches that kernels write in place: after any change between two steps they behave as stock's."""

import copy
import io
import pickle

import pytest
import torch
from models import assert_close, fused_calls, inputs, pair
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from qvl_model.compat import CACHE

PROMPT, NEXT, OTHER = [5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23]


@pytest.fixture(scope="module")
def models():
    return pair("odd")


@torch.no_grad()
def _steps(model, cache, ids, rows: int = 1) -> torch.Tensor:
    """Logits of ids fed one by one to a cache."""
    return torch.cat([model(input_ids=torch.tensor([[i]] * rows), **{CACHE: cache}).logits for i in ids], 1)


def _filled(model, rows: int = 1) -> DynamicCache:
    cache = DynamicCache()
    _steps(model, cache, PROMPT, rows)
    return cache


@torch.no_grad()
def _from_scratch(model, ids) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits


def _through_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


def _through_save(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _shallow(cache):
    """Layers copied, their tensors shared."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@pytest.mark.parametrize("branch", [copy.deepcopy, _through_pickle, _through_save, _shallow])
@pytest.mark.parametrize("copy_first", [False, True], ids=["original goes on first", "copy goes on first"])
def test_two_branches_of_one_cache(models, branch, copy_first):
    stock, fast = models
    cache = _filled(fast)
    other = branch(cache)
    runs = [(cache, NEXT), (other, OTHER)]
    got = {}
    for step in range(len(NEXT)):  # interleaved, so that one would overwrite the other's memory
        for target, ids in runs[::-1] if copy_first else runs:
            got.setdefault(ids[0], []).append(_steps(fast, target, ids[step : step + 1]))
    for ids in (NEXT, OTHER):
        assert_close(torch.cat(got[ids[0]], 1), _from_scratch(stock, PROMPT + ids)[:, len(PROMPT) :])


def test_crop_then_go_on_twice(models):
    stock, fast = models
    cache = _filled(fast)
    _steps(fast, cache, NEXT)
    kept = [layer.keys for layer in cache.layers]
    before = [keys.clone() for keys in kept]
    cache.crop(-len(NEXT))
    assert_close(_steps(fast, cache, OTHER), _from_scratch(stock, PROMPT + OTHER)[:, len(PROMPT) :])
    assert all(torch.equal(*both) for both in zip(kept, before, strict=True)), "a tensor taken from the cache changed"


def test_batch_operations(models):
    stock, fast = models
    got = []
    for model in (fast, stock):
        cache = _filled(model)
        cache.batch_repeat_interleave(3)
        with torch.no_grad():
            parts = [model(input_ids=torch.tensor([[1], [2], [3]]), **{CACHE: cache}).logits]
            cache.reorder_cache(torch.tensor([2, 2, 0]))
            parts.append(model(input_ids=torch.tensor([[4], [5], [6]]), **{CACHE: cache}).logits)
            cache.batch_select_indices(torch.tensor([0, 2]))
            parts.append(model(input_ids=torch.tensor([[7], [8]]), **{CACHE: cache}).logits)
        got.append(torch.cat(parts))
    assert_close(*got)


def test_reset_and_reuse(models):
    """Reset means the same for both models in this version (5.17 zeroes a dynamic cache, 5.23 empties it)."""
    for make in (_filled, lambda model: StaticCache(config=model.config.text_config, max_cache_len=12)):
        results = []
        for model in models:
            cache = make(model)
            _steps(model, cache, NEXT)
            cache.reset()
            results.append((cache.get_seq_length(), _steps(model, cache, OTHER)))
        (stock_length, expected), (length, got) = results
        assert length == stock_length
        assert_close(got, expected)


def test_keys_and_values_are_stocks(models):
    ours, theirs = (_filled(model, rows=2) for model in models[::-1])
    assert len(ours.layers) == len(theirs.layers)
    for mine, stock in zip(ours.layers, theirs.layers, strict=True):
        assert (
            isinstance(mine, type(stock))
            and mine.get_seq_length() == stock.get_seq_length()
            and mine.keys.shape == stock.keys.shape
        )
        assert_close(mine.keys, stock.keys)
        assert_close(mine.values, stock.values)


def test_views_are_of_the_length_of_the_moment(models):
    fast = models[1]
    cache = _filled(fast)
    layer = cache.layers[0]
    assert type(layer) is DynamicLayer and layer.keys is layer.keys
    seen = [layer.keys]
    for i in NEXT:
        _steps(fast, cache, [i])
        seen.append(layer.keys)
    assert [keys.shape[2] for keys in seen] == list(range(len(PROMPT), len(PROMPT) + len(NEXT) + 1))
    assert all(torch.equal(keys, seen[-1][:, :, : keys.shape[2]]) for keys in seen)
    assert layer.get_mask_sizes(2) == (len(PROMPT) + len(NEXT) + 2, 0)


@pytest.mark.parametrize("change", ["nothing", "keys", "values", "crop", "copy", "deepcopy", "pickle"])
def test_a_layer_holds_what_stocks_does(models, change):
    cache = _filled(models[1])
    keys, values = cache.layers[0].keys, cache.layers[0].values
    if change in ("keys", "values"):
        setattr(cache.layers[0], change, getattr(cache.layers[0], change).clone())
    elif change == "crop":
        cache.crop(-1)
        keys, values = keys[:, :, :-1], values[:, :, :-1]
    elif change != "nothing":
        cache = {"copy": _shallow, "deepcopy": copy.deepcopy, "pickle": _through_pickle}[change](cache)
    layer = cache.layers[0]
    expected = _filled(models[0])
    assert (
        type(layer) is DynamicLayer
        and set(vars(layer)) == set(vars(expected.layers[0]))
        and set(vars(cache)) == set(vars(expected))
    )
    assert layer.is_initialized and vars(layer)["keys"] is layer.keys and vars(layer)["values"] is layer.values
    assert (
        torch.equal(layer.keys, keys) and torch.equal(layer.values, values) and layer.get_seq_length() == keys.shape[2]
    )


def test_a_step_does_not_copy_the_cache(models):
    fast = models[1]
    cache = _filled(fast)
    _steps(fast, cache, NEXT)
    pointers = [layer.keys.data_ptr() for layer in cache.layers]
    _steps(fast, cache, range(1, 20))
    assert [layer.keys.data_ptr() for layer in cache.layers] == pointers


def test_reserved_memory_stays_small(models):
    fast = models[1]
    cache = DynamicCache()
    with torch.no_grad():
        fast(input_ids=inputs([1500])["input_ids"], **{CACHE: cache})
        fast(input_ids=torch.tensor([[3]]), **{CACHE: cache})
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() <= 1.1 * layer.keys.nbytes


def test_full_static_cache_raises_as_stock_does(models):
    for model in models:
        cache = StaticCache(config=model.config.text_config, max_cache_len=len(PROMPT))
        _steps(model, cache, PROMPT)
        with pytest.raises((IndexError, RuntimeError)):
            _steps(model, cache, NEXT)


def test_unknown_caches_take_the_stock_code(models):
    """A sliding window, quantised or offloaded cache keeps its own update."""

    class Layers(DynamicCache):
        def update(self, keys, values, index, *args, **kwargs):
            updated.append(index)
            return super().update(keys, values, index, *args, **kwargs)

    stock, fast = models
    updated: list[int] = []
    with fused_calls(fast) as calls:
        got = _steps(fast, Layers(), NEXT)
    assert_close(got, _from_scratch(stock, NEXT))
    assert calls.fused["decoder_layer"] == 0 and len(updated) == len(NEXT) * len(fast.model.language_model.layers)


def test_cache_of_another_dtype_is_not_written_into(models):
    results = []
    for model in models:
        cache = _filled(model)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.half(), layer.values.half()
        results.append(_steps(model, cache, NEXT[:1]))  # torch.cat promotes
    assert_close(*results, 1e-5)
