"""Code of the user counts as in stock: hooks, streamers, methods replaced on model and cache, changes while
``generate`` runs.
"""

import pytest
import torch
from generation_runs import GREEDY, Tokens, filled_cache, generate, same_runs
from models import assert_close, inputs, pair, relative
from transformers import DynamicCache, StaticCache, masking_utils
from transformers.cache_utils import DynamicLayer
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import TextStreamer

from qvl_model import digits
from qvl_model.compat import CACHE
from qvl_model.generation.step_cpu import CpuStep
from qvl_model.processing import load_processor


def _layer(model, index):
    return model.model.language_model.layers[index]


CHANGES = {
    "hook on a layer": lambda model: _layer(model, 2).register_forward_hook(lambda module, args, out: out * 1.5),
    "hook before a layer": lambda model: _layer(model, 3).register_forward_pre_hook(
        lambda module, args: (args[0] + 0.25, *args[1:])
    ),
    "hook inside": lambda model: _layer(model, 4).mlp.down_proj.register_forward_hook(lambda module, args, out: -out),
    "hook on the text model": lambda model: model.model.language_model.register_forward_hook(_scale_last),
    "hook on the head": lambda model: model.lm_head.register_forward_hook(lambda module, args, out: -out),
    "hook on the embedding": lambda model: model.model.language_model.embed_tokens.register_forward_hook(
        lambda module, args, out: out * 0.5
    ),
    "weights in place": lambda model: _layer(model, 3).self_attn.o_proj.weight.data.mul_(2.0),
    "new data": lambda model: setattr(
        _layer(model, 3).self_attn.o_proj.weight, "data", _layer(model, 3).self_attn.o_proj.weight.data * 2.0
    ),
    "an epsilon": lambda model: setattr(_layer(model, 1).input_layernorm, "variance_epsilon", 0.5),
    "rotary frequencies": lambda model: model.model.language_model.rotary_emb.inv_freq.mul_(0.5),
    "a layer less": lambda model: model.model.language_model.layers.__delitem__(4),
    "a layer twice": lambda model: model.model.language_model.layers.__setitem__(2, _layer(model, 1)),
    "layers swapped": lambda model: _swap(model.model.language_model.layers),
    "places in the cache swapped": lambda model: _swap_places(_layer(model, 1).self_attn, _layer(model, 3).self_attn),
    "a weight that is no parameter": lambda model: _plain_tensor(_layer(model, 2).mlp.up_proj, "weight"),
    "an embedding that is no parameter": lambda model: _plain_tensor(model.model.language_model.embed_tokens, "weight"),
}


def _swap(layers):
    layers[1], layers[2] = layers[2], layers[1]


def _swap_places(one, other):
    one.layer_idx, other.layer_idx = other.layer_idx, one.layer_idx


def _plain_tensor(module, name):
    value = getattr(module, name).detach() * 1.5
    delattr(module, name)
    setattr(module, name, value)


def _scale_last(module, args, out):
    out.last_hidden_state = out.last_hidden_state * torch.linspace(-1, 1, out.last_hidden_state.shape[-1])
    return out


@pytest.mark.parametrize("when", ["between calls", "by a streamer"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_counts(change, when):
    outs, options = [], GREEDY | dict(return_dict_in_generate=True, output_logits=True)
    if change in ("a layer less", "a layer twice") and when == "by a streamer":
        pytest.skip("stock itself fails: the cache has another layer, or twice as many tokens in one")
    for model in pair("odd"):
        before = generate(model, inputs([9]), **options)
        done = []
        if when == "between calls":
            CHANGES[change](model)
            outs.append(generate(model, inputs([9]), **options))
        else:
            streamer = Tokens(lambda model=model, done=done: done or done.append(CHANGES[change](model)))
            outs.append(generate(model, inputs([9]), **options, streamer=streamer))
    stock, ours = outs
    assert torch.equal(ours.sequences, stock.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(stock.logits))
    matters = change != "places in the cache swapped" or when == "by a streamer"  # any order suits an empty cache
    assert not matters or relative(torch.stack(stock.logits), torch.stack(before.logits)) > 1e-3


@pytest.mark.parametrize("where", ["streamer", "tokenizer"])
def test_a_function_on_a_stock_streamer_changes_the_model(where):
    """It is the user's code, although the class of the streamer is transformers' own."""
    outs, options = [], GREEDY | dict(return_dict_in_generate=True, output_logits=True)
    for model in pair("odd"):
        streamer, calls = TextStreamer(load_processor(digits.CHECKPOINT).tokenizer), []

        def change(*args, model=model, calls=calls, **kwargs):
            calls.append(args)
            if len(calls) == 3:
                _layer(model, 1).register_forward_hook(lambda module, args, out: out * 1.7)
            return "x"

        if where == "streamer":
            streamer.on_finalized_text = change
        else:
            streamer.tokenizer.decode = change
        outs.append(generate(model, inputs([9]), **options, streamer=streamer))
        assert len(calls) > 3
    stock, ours = outs
    assert_close(torch.stack(ours.logits), torch.stack(stock.logits))


def _halving(update):
    def halved(k, v, *args, **kwargs):
        return update(k * 0.5, v, *args, **kwargs)

    return halved


@pytest.mark.parametrize("when", ["before the prompt", "by a streamer"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("place", ["cache", "layer"])
def test_an_update_of_ones_own(models, place, kind, when):
    results = []
    for model in models:
        cache = kind(config=model.config.text_config, **(dict(max_cache_len=48) if kind is StaticCache else {}))

        def replace(cache=cache):
            kept = cache if place == "cache" else cache.layers[1]
            if "update" not in kept.__dict__:
                kept.update = _halving(kept.update)

        if when == "before the prompt":
            replace()
        streamer = Tokens(replace) if when == "by a streamer" else None
        results.append(
            generate(
                model,
                inputs([9]),
                **GREEDY,
                **{CACHE: cache},
                return_dict_in_generate=True,
                output_logits=True,
                streamer=streamer,
            )
        )
    stock, ours = results
    assert torch.equal(ours.sequences, stock.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(stock.logits))
    plain = generate(models[0], inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert relative(torch.stack(stock.logits), torch.stack(plain.logits)) > 1e-3


def test_an_update_of_a_class(models, monkeypatch):
    plain = generate(models[0], inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True)
    update = DynamicLayer.update
    monkeypatch.setattr(
        DynamicLayer, "update", lambda layer, k, v, *args, **kwargs: update(layer, k * 0.5, v, *args, **kwargs)
    )
    stock, _ = same_runs(models, inputs([9]), **GREEDY)
    assert relative(torch.stack(stock.logits), torch.stack(plain.logits)) > 1e-3


class _Flipped:
    """A user's mix-in that negates the result of its class."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out * 0.5
        out[0].copy_(out[0].flip(-1))
        return out


@pytest.mark.parametrize("place", ["model", "model.language_model", "model.language_model.layers.2"])
def test_a_forward_that_a_subclass_overrides_counts(place):
    outs, options = [], GREEDY | dict(return_dict_in_generate=True, output_logits=True)
    for model in pair("odd"):
        before = generate(model, inputs([9]), **options)
        module = model.get_submodule(place)
        module.__class__ = type("Flipped", (_Flipped, type(module)), {"__module__": __name__})
        out = generate(model, inputs([9]), **options)
        with torch.no_grad():
            outs.append((torch.stack(out.logits), model(**inputs([6])).logits))
    for ours, stock in zip(outs[1], outs[0]):
        assert_close(ours, stock)
    assert relative(outs[0][0], torch.stack(before.logits)) > 1e-3


def test_inputs_that_somebody_else_prepares_count():
    """As PEFT's prefix tuning does: the method is replaced on the model."""
    outs = []
    for model in pair("odd"):
        prepare = model.prepare_inputs_for_generation

        def prepared(*args, prepare=prepare, **kwargs):
            found = prepare(*args, **kwargs)
            found["attention_mask"] = found["attention_mask"].clone()
            found["attention_mask"][:, 2:4] = 0
            return found

        model.prepare_inputs_for_generation = prepared
        outs.append(generate(model, inputs([9], [4]), **GREEDY, return_dict_in_generate=True, output_logits=True))
    assert_close(torch.stack(outs[1].logits), torch.stack(outs[0].logits))


def test_a_mask_function_registered_anew_counts(models, monkeypatch):
    functions = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    known = functions["sdpa"]

    def mask(*args, **kwargs):
        out = known(*args, **kwargs | {"allow_is_causal_skip": False}).clone()
        out[..., 2:4] = False
        return out

    monkeypatch.setitem(functions._global_mapping, "sdpa", mask)
    outs = [
        generate(model, inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True) for model in models
    ]
    assert_close(torch.stack(outs[1].logits), torch.stack(outs[0].logits))


def _swap_weights(model):
    for parameter in model.model.language_model.layers.parameters():
        parameter.data = parameter.data * 0.5


@pytest.mark.parametrize("where", ["a function of prefixes", "a hook on the head"])
def test_functions_of_ones_own_that_change_the_model(where):
    outs = []
    for model in pair("odd"):
        calls = []

        def change(*_, model=model, calls=calls):
            calls.append(1)
            if len(calls) == 4:
                _swap_weights(model)

        options = GREEDY | dict(return_dict_in_generate=True, output_logits=True)
        if where == "a hook on the head":
            model.lm_head.register_forward_hook(change)
        else:
            options["prefix_allowed_tokens_fn"] = lambda batch, ids, change=change: (change(), list(range(160)))[1]
        outs.append(generate(model, inputs([9]), **options))
    assert_close(torch.stack(outs[1].logits), torch.stack(outs[0].logits))


def test_memory_of_weights_that_are_swapped_meanwhile_stays():
    """For example by another thread: memory that a step reads is not freed."""
    _, ours = pair("odd")
    weight = _layer(ours, 1).mlp.up_proj.weight
    step = CpuStep.begin(ours, filled_cache(ours), torch.full((3, 1, 1), 5), None, foreign=False)
    address, expected = weight.data_ptr(), weight.clone()
    weight.data = weight.data * 0.5
    (kept,) = [x for x in step._alive if x.data_ptr() == address]
    assert torch.equal(kept, expected)


class _Looks(StoppingCriteria):
    def __init__(self, cache):
        self.cache, self.seen = cache, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(int(self.cache.get_seq_length()))
        if len(self.seen) == 3:
            self.cache.layers[1].values.zero_()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_a_criterion_that_looks_into_the_users_cache(models):
    results = []
    for model in models:
        cache = DynamicCache(config=model.config.get_text_config())
        looks = _Looks(cache)
        out = generate(
            model,
            inputs([9]),
            **GREEDY,
            **{CACHE: cache},
            stopping_criteria=[looks],
            return_dict_in_generate=True,
            output_logits=True,
        )
        results.append((torch.stack(out.logits), looks.seen))
    assert results[0][1] == results[1][1]
    assert_close(results[1][0], results[0][0])
