"""A user's decode loop, ``model(...)`` per token: one fused call for all layers, and stock's results after any change
in between.
"""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from models import assert_close, inputs, pair
from transformers import DynamicCache, StaticCache

import qvl_model
from qvl_model.compat import CACHE
from qvl_model.generation import kv_cache
from qvl_model.modules import decoder_layer

PROMPT, NEXT = [5, 6, 7, 8, 9], [11, 12, 13, 14]
LAYERS = 5  # of "odd"


@pytest.fixture
def models():
    return pair("odd")


@pytest.fixture
def calls(monkeypatch):
    """How many layers each fused call ran."""
    seen = []

    class Spy(decoder_layer.Run):
        def __call__(self, *args, **kwargs):
            seen.append(len(self._layers))
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(decoder_layer, "Run", Spy)
    return seen


@torch.no_grad()
def _logits(model, ids, cache, **options) -> torch.Tensor:
    """Logits of ids fed one by one."""
    return torch.cat([model(input_ids=torch.tensor([[i]]), **{CACHE: cache}, **options).logits for i in ids], 1)


def _layers(model):
    return model.model.language_model.layers


def _crop(cache, length: int) -> None:
    """The argument of ``DynamicCache.crop`` differs between versions of transformers."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


def _compare(models, change=lambda model: None, cache=DynamicCache) -> None:
    """Decodes a prompt, changes both models, and decodes on."""
    expected, out = [], []
    for model, results in zip(models, (expected, out)):
        kept = cache() if cache is DynamicCache else cache(model)
        results.append(_logits(model, PROMPT, kept))
        change(model)
        results.append(_logits(model, NEXT, kept))
    assert_close(torch.cat(out, 1), torch.cat(expected, 1))


def test_one_call_a_token(models, calls):
    _compare(models)
    assert calls == [LAYERS] * (len(PROMPT) + len(NEXT))


def test_static_cache(models, calls):
    _compare(models, cache=lambda model: StaticCache(config=model.config.text_config, max_cache_len=16))
    assert calls == [LAYERS] * (len(PROMPT) + len(NEXT))


def _replace_output(model):
    _layers(model)[2].register_forward_hook(lambda module, args, out: out * 1.5)


def _replace_input(model):
    _layers(model)[3].register_forward_pre_hook(lambda module, args: (args[0] + 0.25, *args[1:]))


def _edit_in_place(model):
    _layers(model)[1].register_forward_hook(lambda module, args, out: out.mul_(2.0))


def _hook_inside(model):
    _layers(model)[4].mlp.down_proj.register_forward_hook(lambda module, args, out: -out)


def _hook_on_attention(model):
    _layers(model)[3].self_attn.register_forward_hook(lambda module, args, out: (out[0] * 0.5, out[1]))


def _hook_before_attention(model):
    def hook(module, args, kwargs):
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] * 0.5}

    _layers(model)[2].self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def _forward_of_an_instance(model):
    layer = _layers(model)[2]
    layer.forward = lambda x, *args, forward=layer.forward, **kwargs: forward(x, *args, **kwargs) + 1.0


def _constant(model):
    _layers(model)[2].forward = lambda x, *args, **kwargs: x * 0.5


def _swap(model):
    layers = _layers(model)
    layers[1].mlp, layers[2].mlp = layers[2].mlp, layers[1].mlp


def _weights(model):
    with torch.no_grad():
        _layers(model)[3].self_attn.o_proj.weight.mul_(2.0)


def _data(model):
    _layers(model)[3].self_attn.o_proj.weight.data = _layers(model)[3].self_attn.o_proj.weight.data * 2.0


def _epsilon(model):
    _layers(model)[4].input_layernorm.variance_epsilon = 0.5


def _places(model):
    one, other = _layers(model)[0].self_attn, _layers(model)[3].self_attn
    one.layer_idx, other.layer_idx = other.layer_idx, one.layer_idx


def _strides(model):
    weight = _layers(model)[3].self_attn.o_proj.weight
    weight.data = weight.data[:1].expand(weight.shape)


def _turned(model):
    weight = _layers(model)[3].mlp.down_proj.weight
    weight.data = weight.data.t().contiguous().t()


CHANGES = [
    _replace_output,
    _replace_input,
    _edit_in_place,
    _hook_inside,
    _hook_on_attention,
    _hook_before_attention,
    _forward_of_an_instance,
    _constant,
    _swap,
    _weights,
    _data,
    _epsilon,
    _places,
    _strides,
    _turned,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_what_changes_between_tokens_counts(models, change):
    _compare(models, change)


def test_in_inference_mode(models, calls):
    def logits(model):
        cache = DynamicCache()
        with torch.inference_mode():
            return [model(input_ids=torch.tensor([[i]]), **{CACHE: cache}).logits for i in PROMPT + NEXT]

    stock, fast = models
    assert_close(torch.cat(logits(fast), 1), torch.cat(logits(stock), 1))
    assert calls == [LAYERS] * len(PROMPT + NEXT)
    for model in models:
        _edit_in_place(model)
    assert_close(torch.cat(logits(fast), 1), torch.cat(logits(stock), 1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hidden_states_edited_in_place_between_layers(models, mode):
    """In a user's loop over the layers, without hooks."""
    outs = []
    for model in models:
        text, cache = model.model.language_model, DynamicCache()
        with mode():
            for position, token in enumerate(PROMPT):
                x = text.embed_tokens(torch.tensor([[token]]))
                tables = text.rotary_emb(x, torch.full((3, 1, 1), position))
                for index, layer in enumerate(text.layers):
                    x = layer(x, position_embeddings=tables, attention_mask=None, **{CACHE: cache})
                    if index == 2:
                        x.mul_(1.5)
            outs.append(x.clone())
    assert_close(outs[1], outs[0])


@pytest.mark.parametrize("place", ["cache", "layer"])
def test_an_update_of_ones_own(models, place):
    plain = _logits(models[0], PROMPT, DynamicCache())

    def cache(model):
        kept = DynamicCache(config=model.config.text_config)
        changed = kept if place == "cache" else kept.layers[1]
        changed.update = lambda k, v, *args, update=changed.update, **kwargs: update(k * 0.5, v, *args, **kwargs)
        return kept

    expected, out = (_logits(model, PROMPT, cache(model)) for model in models)
    assert_close(out, expected)
    assert (expected - plain).abs().max() > 1e-3


def test_hidden_states_are_captured(models):
    for options in ({"output_hidden_states": True}, {"output_attentions": True}):
        got = []
        for model in models:
            if "output_attentions" in options:
                model.set_attn_implementation("eager")
            cache = DynamicCache()
            with torch.no_grad():
                steps = [model(input_ids=torch.tensor([[i]]), **{CACHE: cache}, **options) for i in PROMPT]
            got.append([x for step in steps for x in (step.hidden_states or step.attentions)])
        for theirs, ours in zip(*got, strict=True):
            assert_close(ours, theirs)


def test_a_layer_less(models):
    def shorten(model):
        del _layers(model)[LAYERS - 1]

    _compare(models, shorten)


def test_two_caches_of_one_model_take_turns(models):
    results = []
    for model in models:
        caches = DynamicCache(), DynamicCache()
        results.append(
            torch.cat([_logits(model, [i + 20 * side], caches[side]) for i in PROMPT + NEXT for side in (0, 1)], 1)
        )
    assert_close(results[1], results[0])


def test_images_in_a_later_turn(models, calls):
    """Few tokens with visual features that are added between layers."""
    turn = inputs([2, (1, 2, 2), 1])
    results = []
    for model in models:
        model.model.rope_deltas = None
        cache = DynamicCache()
        first = _logits(model, PROMPT, cache)
        later = dict(turn, attention_mask=torch.ones(1, len(PROMPT) + turn["input_ids"].shape[1], dtype=torch.long))
        with torch.no_grad():
            second = model(
                **later, **{CACHE: cache}, position_ids=torch.arange(5, 5 + turn["input_ids"].shape[1]).expand(3, 1, -1)
            ).logits
        results.append(torch.cat((first, second, _logits(model, NEXT, cache)), 1))
    assert_close(results[1], results[0])
    assert calls == [LAYERS] * len(PROMPT) + [1] * LAYERS + [LAYERS] * len(NEXT)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["shallow", "deep", "pickle"],
)
def test_copies_of_a_cache(models, copied):
    results = []
    for model in models:
        cache = DynamicCache()
        out = [_logits(model, PROMPT, cache)]
        other = copied(cache)
        if other.layers is cache.layers:
            other.layers = [copy.copy(layer) for layer in cache.layers]
        out += [_logits(model, NEXT, other), _logits(model, NEXT[::-1], cache)]
        results.append(torch.cat(out, 1))
    assert_close(results[1], results[0])


def test_copies_of_a_model(models):
    stock, fast = models
    _logits(fast, PROMPT, DynamicCache())
    twin = copy.deepcopy(fast)
    for model in (stock, twin):
        _weights(model)
    assert_close(_logits(twin, PROMPT, DynamicCache()), _logits(stock, PROMPT, DynamicCache()))


def test_cropped_between_tokens(models):
    results = []
    for model in models:
        cache = DynamicCache()
        first = _logits(model, PROMPT, cache)
        _crop(cache, 3)
        results.append(torch.cat((first, _logits(model, NEXT, cache)), 1))
    assert_close(results[1], results[0])


def test_threads_share_a_model(models):
    stock, fast = models
    prompts = [[n, n + 1, n + 2, n + 3, n + 4, n + 5] for n in range(4)]
    expected = [_logits(stock, prompt, DynamicCache()) for prompt in prompts]
    for _ in range(5):
        got = [None] * len(prompts)
        threads = [
            threading.Thread(target=lambda i=i: got.__setitem__(i, _logits(fast, prompts[i], DynamicCache())))
            for i in range(len(prompts))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for ours, theirs in zip(got, expected, strict=True):
            assert_close(ours, theirs)


def test_a_forward_that_breaks_off(models):
    stock, fast = models
    cache, kept = DynamicCache(), DynamicCache()
    _logits(fast, PROMPT, cache), _logits(stock, PROMPT, kept)

    def refuse(*_):
        raise RuntimeError("enough")

    handle = _layers(fast)[2].register_forward_hook(refuse)
    with pytest.raises(RuntimeError, match="enough"):
        _logits(fast, NEXT[:1], cache)
    handle.remove()
    _crop(cache, len(PROMPT))
    assert_close(_logits(fast, NEXT, cache), _logits(stock, NEXT, kept))


def test_models_and_caches_are_freed():
    _, fast = pair("odd")
    cache = DynamicCache()
    _logits(fast, PROMPT, cache)
    seen = [
        weakref.ref(x) for x in (fast, *_layers(fast), _layers(fast)[2].mlp.up_proj.weight, cache, cache.layers[0].keys)
    ]
    model_only = seen[: LAYERS + 2]
    del fast
    gc.collect()
    assert all(x() is None for x in model_only)
    del cache
    gc.collect()
    assert all(x() is None for x in seen)


def test_a_layer_with_dropout_is_stock_code(models, calls):
    _, fast = models
    cache = DynamicCache()
    fast.train()
    _logits(fast, PROMPT, cache)
    assert calls == [LAYERS] * len(PROMPT)  # these layers have no dropout
    _layers(fast)[2].self_attn.attention_dropout = 0.5
    calls.clear()
    _logits(fast, NEXT, cache)
    assert calls == [1] * (LAYERS - 1) * len(NEXT)


def test_what_a_cache_has_outgrown_is_freed_layer_by_layer(models, monkeypatch):
    _, fast = models
    cache = DynamicCache()
    _logits(fast, PROMPT, cache)
    old = [weakref.ref(kv_cache._grown[layer].memory.k_cache) for layer in cache.layers]
    freed, make = [], kv_cache.PreparedCache

    def spy(k_cache, v_cache):
        freed.append(sum(tensor() is None for tensor in old))
        return make(k_cache, v_cache)

    monkeypatch.setattr(kv_cache, "PreparedCache", spy)
    _logits(fast, range(10, 10 + kv_cache._ROOM), cache)
    assert freed == list(range(LAYERS)) and all(tensor() is None for tensor in old)


def test_packing_frees_what_was_planned(models):
    _, fast = models
    _logits(fast, PROMPT, DynamicCache())
    weight = weakref.ref(_layers(fast)[3].mlp.up_proj.weight)
    qvl_model.accelerate(fast, weights="int8")
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("cache", [(), []], ids=str)
def test_what_is_no_cache_is_refused_as_by_stock(cache):
    for model in pair("small"):
        layer = model.model.language_model.layers[0]
        x, angles = torch.randn(1, 1, layer.hidden_size), torch.randn(1, 1, layer.self_attn.head_dim)
        with torch.no_grad(), pytest.raises(AttributeError, match="update"):
            layer(x, position_embeddings=(angles.cos(), angles.sin()), attention_mask=None, **{CACHE: cache})
