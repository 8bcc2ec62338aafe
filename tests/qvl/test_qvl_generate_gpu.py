"""QVL's decode steps of the GPU, here without CUDA graphs on CPU tensors, equal the stock model for any images."""

import copy
import gc
import weakref

import pytest
import torch
from gpu_steps import begun, offer, record
from models import assert_close, relative
from qvl_models import IMAGE, VOCABULARY, inputs, pad_pixels, pair
from torch import nn
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import qvl_model
from qvl_kernels.testing import poisoned_empty
from qvl_model.compat import CACHE
from qvl_model.generation import images, step_gpu
from qvl_model.qvl.cache import VisualLayer, add_visual_layer

NAMES = ["mlp", "attention"]
GREEDY = dict(do_sample=False, max_new_tokens=9)


def _ragged(*sizes: tuple[int, int]) -> dict:
    """A row of text for each image size in pixels; (0, 0): no image."""
    generator = torch.Generator().manual_seed(3)
    return inputs(*(7, 4, 5)[: len(sizes)], image=None) | pad_pixels(
        *(torch.randn(3, *size, generator=generator) for size in sizes)
    )


BATCHES = {
    "one": inputs(5),
    "padded": inputs(7, 4),
    "one token": inputs(1),
    "text only": inputs(6, 3, image=None),
    "large image": inputs(6, image=(40, 52)),
    "a row without": _ragged((9, 14), (0, 0), (16, 6)),
    "different sizes": _ragged((4, 4), (30, 24)),
    "pairs": {**inputs(5, 5), "pixel_values": torch.randn(2, 2, 3, 8, 12, generator=torch.Generator().manual_seed(1))},
}


@pytest.fixture(scope="module")
def pairs():
    return {name: pair(name) for name in NAMES}


@pytest.fixture(params=NAMES)
def models(request, pairs, monkeypatch):
    """(plain, accelerated)"""
    offer(monkeypatch)
    return pairs[request.param]


@pytest.fixture
def steps(monkeypatch):
    """Every step that began."""
    return begun(monkeypatch)


def _generate(model, batch, **options):
    torch.manual_seed(3)
    return model.generate(**batch, **{**GREEDY, **options})


def _same(models, batch, **options):
    """Tokens, logits and the whole cache; the output of the accelerated model."""
    plain, ours = (
        _generate(model, batch, **options, return_dict_in_generate=True, output_logits=True) for model in models
    )
    assert torch.equal(ours.sequences, plain.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(plain.logits))
    for got, expected in zip(ours[CACHE].layers, plain[CACHE].layers, strict=True):
        assert type(got) is type(expected) and got.is_initialized == expected.is_initialized
        assert not expected.is_initialized or got.keys.stride() == expected.keys.stride()
        for name in ("keys", "values", "lengths"):
            value = getattr(expected, name, None)
            assert (
                value is None
                and getattr(got, name, None) is None
                or assert_close(getattr(got, name).float(), value.float()) is None
            )
    return ours


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_as_the_plain_model(models, steps, batch):
    out = _same(models, batch)
    assert len(steps) == 1 and out.sequences.shape[1] == batch["input_ids"].shape[1] + GREEDY["max_new_tokens"]
    fused = tuple(models[1].config.cross_attention_layers)
    assert steps[0].layers_with_images == (fused if "pixel_values" in batch else ())


def test_sampled_and_without_the_callers_cache(models, steps):
    for batch in BATCHES.values():
        plain, ours = (_generate(model, batch, do_sample=True, temperature=1.4, top_k=30) for model in models)
        assert torch.equal(plain, ours)
    assert len(steps) == len(BATCHES)


def test_one_step_serves_all_images(models, steps):
    """Smaller, larger and fewer images share a step; text alone has its own, and both are kept."""
    for batch in (
        inputs(5, 4),
        _ragged((9, 14), (0, 0)),
        inputs(6, 6, image=(48, 60)),
        inputs(3, 7, image=None),
        _ragged((0, 0), (5, 7)),
    ):
        _same(models, batch)
    seen, text = steps[0], steps[3]
    assert (
        steps == [seen, seen, seen, text, seen]
        and text is not seen
        and step_gpu._pools[models[1]]._idle == [text, seen]
    )
    assert seen._images._caches.capacity == 0  # no keys or values are kept


def test_next_turns(models, steps):
    """The kept cache continues with the whole text or with new tokens only; its image part does not change."""
    for whole in (True, False):
        results = []
        for model in models:
            batch, cache = inputs(5), DynamicCache(config=model.config)
            first = _generate(model, batch, **{CACHE: cache})
            seen = [(layer.keys, layer.values) for layer in cache.layers if type(layer) is VisualLayer]
            turn = torch.cat((first, torch.tensor([[3, 4, 5]])), 1)
            new = turn if whole else turn[:, cache.get_seq_length() :]
            second = _generate(model, dict(input_ids=new, attention_mask=torch.ones_like(turn)), **{CACHE: cache})
            results.append((first.tolist(), second.tolist(), cache.get_seq_length()))
            assert seen and all(
                layer.keys is k and layer.values is v
                for layer, (k, v) in zip(cache.layers[-len(seen) :], seen, strict=True)
            )
        assert results[0] == results[1]
    assert len(steps) == 4


def test_tokens_that_stand_for_images_have_their_type(models):
    """Also for the token that the model generates."""
    others = [token for token in range(VOCABULARY) if token not in (IMAGE, 5)]
    out = _same(models, inputs(5, 6), suppress_tokens=others)
    assert (out.sequences[:, 7:-1] == IMAGE).any()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights(models, steps, weights):
    """As by the model's own forward, token by token."""
    ours = qvl_model.accelerate(copy.deepcopy(models[1]), weights=weights, group=32)
    out = _generate(ours, BATCHES["a row without"])
    assert len(steps) == 1
    ours.model.language_model.register_forward_hook(lambda *_: None)
    assert torch.equal(out, _generate(ours, BATCHES["a row without"])) and len(steps) == 1


def test_rows_that_fill_up_a_step_see_nothing(models, steps, monkeypatch):
    """Earlier contents of a step's memory do not affect results."""
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    _same(models, BATCHES["a row without"])
    assert steps[0].rows == 4 and steps[0]._images._lengths[0].tolist()[1::2] == [0, 0]


class _At(BaseStreamer):
    """Calls a function with the third token."""

    def __init__(self, function):
        self.count, self.function = 0, function

    def put(self, value):
        self.count += 1
        if self.count == 4:
            self.function()

    def end(self):
        pass


@pytest.mark.parametrize("image", [(14, 19), None], ids=["another image", "the first image"])
def test_images_that_a_streamer_changes(models, image):
    outs = []
    for model in models:
        cache, other = (DynamicCache(config=model.config) for _ in range(2))
        with torch.no_grad():
            model(**inputs(5, seed=7), **{CACHE: other})

        def change(cache=cache, other=other, model=model):
            fused = range(len(model.config.cross_attention_layers))
            for index in fused:
                layer = other.layers[model.config.num_hidden_layers + index]
                add_visual_layer(cache, index, model.config.num_hidden_layers).update(
                    layer.keys * 3, layer.values.flip(2), layer.lengths
                )

        out = _generate(
            model,
            inputs(5, image=image),
            **{CACHE: cache},
            streamer=_At(change),
            return_dict_in_generate=True,
            output_logits=True,
        )
        outs.append(torch.stack(out.logits))
    assert_close(outs[1], outs[0])
    unchanged = torch.stack(
        _generate(models[0], inputs(5, image=image), return_dict_in_generate=True, output_logits=True).logits
    )
    assert relative(outs[0], unchanged) > 1e-3


def test_failures_leave_images_where_they_are(models, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("no memory for images")

    monkeypatch.setattr(images.Images, "load", fail)
    for kept in (True, False):
        plain, ours = models
        with pytest.warns(RuntimeWarning, match="goes on without CUDA graphs: no memory for images"):
            out = _generate(ours, BATCHES["padded"], return_dict_in_generate=kept)
        expected = _generate(plain, BATCHES["padded"], return_dict_in_generate=kept)
        assert torch.equal(out.sequences if kept else out, expected.sequences if kept else expected)
        qvl_model.release(ours)


def test_images_do_not_keep_the_model_nor_training_the_steps(models):
    ours = copy.deepcopy(models[1])
    _generate(ours, inputs(5))
    held = weakref.ref(step_gpu._pools[ours]._idle[0])
    ours.train()
    gc.collect()
    assert held() is None
    _generate(ours.eval(), inputs(5))
    held = [weakref.ref(ours), weakref.ref(step_gpu._pools[ours]._idle[0])]
    del ours
    gc.collect()
    assert [x() for x in held] == [None, None]


def test_under_a_fake_of_cuda(models, monkeypatch):
    """Graphs run on another stream, images included."""
    cuda = record(monkeypatch)
    assert torch.equal(*(_generate(model, inputs(5, 4)) for model in models))
    other = type(cuda.streams[0])(cuda, "other")
    cuda.calls.clear()
    with cuda.stream(other):
        assert torch.equal(*(_generate(model, inputs(5, 4)) for model in models))
    assert cuda.calls.count("memory used on other") == len(step_gpu._pools[models[1]]._idle[0]._tensors())
    assert set(cuda.replayed()) == {"replay on 1, other"}


def _layer(model):
    return model.model.language_model.layers[model.config.cross_attention_layers[-1]]


def _attention(model):
    return _layer(model).fusion.attn


CHANGES = {  # entry of DEPENDS_ON, change; tokens are still run by captured steps
    "a gate": ("memory", lambda model: setattr(_layer(model).fusion, "gate", nn.Parameter(-_layer(model).fusion.gate))),
    "queries": (
        "memory",
        lambda model: setattr(
            _attention(model).q_proj, "weight", nn.Parameter(_attention(model).q_proj.weight.flip(0))
        ),
    ),
    "output": (
        "memory",
        lambda model: setattr(
            _attention(model).o_proj, "weight", nn.Parameter(_attention(model).o_proj.weight.flip(0))
        ),
    ),
    "norm": (
        "memory",
        lambda model: setattr(
            _layer(model).fusion.norm, "weight", nn.Parameter(_layer(model).fusion.norm.weight.neg())
        ),
    ),
    "token types": (
        "memory",
        lambda model: setattr(
            model.model.language_model.embed_token_types,
            "weight",
            nn.Parameter(model.model.language_model.embed_token_types.weight.neg()),
        ),
    ),
    "an epsilon": ("epsilons", lambda model: setattr(_attention(model).q_norm, "variance_epsilon", 3.0)),
    "scale of scores": ("attention", lambda model: setattr(_attention(model), "scaling", 6.0)),
    "rotary base": ("numbers of QVL's config", lambda model: setattr(model.config, "rope_theta", 3.0)),
    "image token": ("numbers of QVL's config", lambda model: setattr(model.config, "image_token_id", None)),
    "implementation": (
        "attention implementation",
        lambda model: setattr(model.config, "_attn_implementation", "eager"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(pairs, monkeypatch, steps, name):
    offer(monkeypatch)
    entry, change = CHANGES[name]
    outs, batch = [], inputs(6, 5)
    for model in map(copy.deepcopy, pairs["mlp"]):
        before = _generate(model, batch, return_dict_in_generate=True, output_logits=True)
        state = step_gpu._state(model) if qvl_model.is_accelerated(model) else {entry: None}
        change(model)
        outs.append(_generate(model, batch, return_dict_in_generate=True, output_logits=True))
    plain, ours = outs
    assert torch.equal(ours.sequences, plain.sequences) and step_gpu._state(model)[entry] != state[entry]
    assert_close(torch.stack(ours.logits), torch.stack(plain.logits))
    assert len(steps) == 2 and steps[0] is not steps[1]
    assert (
        name in ("implementation", "image token")
        or relative(torch.stack(ours.logits), torch.stack(before.logits)) > 1e-3
    )


REASONS = {  # after these, stock's loop generates with the changed modules
    "hook on a fusion": lambda model: _layer(model).fusion.register_forward_hook(lambda module, args, out: out * 1.5),
    "hook on cross-attention": lambda model: _attention(model).register_forward_hook(
        lambda module, args, out: (out[0] * 1.5, out[1])
    ),
    "hook before it": lambda model: _attention(model).register_forward_pre_hook(
        lambda module, args: (args[0] * 1.5, *args[1:])
    ),
    "hook inside": lambda model: _attention(model).o_proj.register_forward_hook(lambda module, args, out: -out),
    "hook on its norm": lambda model: _attention(model).q_norm.register_forward_hook(lambda module, args, out: -out),
    "hook on dropout": lambda model: _layer(model).fusion.dropout.register_forward_hook(lambda module, args, out: -out),
    "hook on token types": lambda model: model.model.language_model.embed_token_types.register_forward_hook(
        lambda module, args, out: out - 2.0
    ),
    "hook on the first dropout": lambda model: model.model.language_model.dropout.register_forward_hook(
        lambda module, args, out: -out
    ),
    "replaced": lambda model: setattr(_layer(model).fusion, "forward", lambda hidden_states, *_: hidden_states * 1.5),
    "its attention replaced": lambda model: setattr(
        _attention(model), "forward", lambda hidden_states, *_: (hidden_states * 1.5, None)
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_no_graph_holds(pairs, monkeypatch, steps, name):
    offer(monkeypatch)
    outs, batch = [], inputs(6, 5)
    for model in map(copy.deepcopy, pairs["mlp"]):
        REASONS[name](model)
        outs.append(_generate(model, batch))
    assert torch.equal(*outs) and not steps
    assert "transformers' own loop" in qvl_model.report(model).decoding


RANDOM = {
    "of the text": lambda model: setattr(model.model.language_model.dropout, "p", 0.5),
    "of a fusion": lambda model: setattr(_layer(model).fusion.dropout, "p", 0.5),
    "of cross-attention": lambda model: setattr(_attention(model), "attention_dropout", 0.5),
}


@pytest.mark.parametrize("name", RANDOM)
def test_dropout_is_not_captured(pairs, monkeypatch, name):
    offer(monkeypatch)
    model = copy.deepcopy(pairs["mlp"][1])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        module.attention_dropout = 0.0
    model.train()
    assert step_gpu.why_not(model) is None
    RANDOM[name](model)
    assert "dropout" in step_gpu.why_not(model) or "not eligible" in step_gpu.why_not(model)
    assert step_gpu.why_not(model.eval()) is None


def test_another_attention_is_its_own(pairs, monkeypatch):
    offer(monkeypatch)
    model = copy.deepcopy(pairs["mlp"][1])
    assert qvl_model.report(model).decoding.startswith("whole steps as CUDA graphs")
    model.config._attn_implementation = "flash_attention_2"
    assert "cross-attention of decoder layer 1 is not eligible for the fast path" in step_gpu.why_not(model)
