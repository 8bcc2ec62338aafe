"""Generation with QVL, stock and accelerated: the KV cache grows, and an image is encoded once, for any strategy."""

import copy
import pickle

import pytest
import torch
from models import assert_close, fused_calls
from qvl_models import inputs, pad_pixels, pair
from transformers import DynamicCache, StaticCache

from qvl_model.compat import CACHE
from qvl_model.generation.step_cpu import CpuStep
from qvl_model.qvl.cache import VisualLayer, holds_images

NAMES = ["mlp", "attention"]
KINDS = ["plain", "accelerated"]


@pytest.fixture(scope="module")
def models():
    return {(name, kind): model for name in NAMES for kind, model in zip(KINDS, pair(name))}


@pytest.fixture(params=[(name, kind) for name in NAMES for kind in KINDS], ids="-".join)
def model(request, models):
    return models[request.param]


@torch.no_grad()
def by_hand(model, batch: dict, steps: int) -> torch.Tensor:
    """Greedy tokens [B, steps] without a KV cache: the whole sequence is recomputed for each."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(steps):
        last = model(**{**batch, "input_ids": ids, "attention_mask": mask}, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, last.argmax(-1, keepdim=True)), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return ids[:, -steps:]


def generated(model, batch: dict, steps: int = 6, **options) -> torch.Tensor:
    out = model.generate(**batch, max_new_tokens=steps, min_new_tokens=steps, **{"do_sample": False, **options})
    return out[:, batch["input_ids"].shape[1] :]


def ragged() -> dict:
    """Three rows: images of different sizes, and one row without."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.randn(3, *size, generator=generator) for size in ((9, 14), (0, 0), (16, 6))]
    return inputs(7, 4, 5, image=None) | pad_pixels(*images)


BATCHES = {
    "one": inputs(5),
    "padded": inputs(7, 4),
    "one token": inputs(1),
    "text only": inputs(6, 3, image=None),
    "ragged": ragged(),
    "pairs": {**inputs(5, 5), "pixel_values": torch.randn(2, 2, 3, 8, 12, generator=torch.Generator().manual_seed(1))},
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_greedy_is_what_forward_says(model, batch, options):
    if "prompt_lookup_num_tokens" in options and len(batch["input_ids"]) > 1:
        batch = {key: value[:1] for key, value in batch.items()}
    assert torch.equal(generated(model, batch, **options), by_hand(model, batch, 6))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["beams", "several beams", "samples"],
)
def test_beams_and_samples(models, name, batch, options):
    """Equal to generation without a cache, where nothing is reordered or repeated; stock and accelerated agree."""
    plain, fast = (models[name, kind] for kind in KINDS)
    outs = []
    for model, cached in ((plain, False), (plain, True), (fast, True)):
        torch.manual_seed(0)
        outs.append(generated(model, batch, use_cache=cached, **options))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def counted(model):
    """Counts of calls while generating: vision tower, key projection of the first cross-attention."""
    counts = {"visual": 0, "keys": 0}
    fusion = next(layer.fusion for layer in model.model.language_model.layers if layer.fusion is not None)

    def count(key):
        return lambda *_: counts.__setitem__(key, counts[key] + 1)

    handles = [
        model.model.visual.register_forward_pre_hook(count("visual")),
        fusion.attn.k_proj.register_forward_pre_hook(count("keys")),
    ]
    return counts, handles


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True, "num_return_sequences": 2}],
    ids=str,
)
def test_images_are_read_once(model, options):
    counts, handles = counted(model)
    try:
        generated(model, inputs(5, 4), **options)
    finally:
        for handle in handles:
            handle.remove()
    assert counts == {"visual": 1, "keys": 1}


def test_beams_read_each_image_once(model):
    rows = []
    handle = model.model.visual.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    try:
        generated(model, inputs(5, 4), num_beams=3)
    finally:
        handle.remove()
    assert rows == [2]


@pytest.mark.parametrize("kind", ["dynamic", "lazy dynamic", "static"])
@torch.no_grad()
def test_the_cache(model, kind):
    settings, batch = model.config, inputs(5, 5)
    cache = {
        "dynamic": lambda: DynamicCache(config=settings),
        "lazy dynamic": DynamicCache,
        "static": lambda: StaticCache(config=settings, max_cache_len=20),
    }[kind]()
    whole = {**batch, "input_ids": torch.cat((batch["input_ids"], torch.tensor([[7, 8, 9], [3, 2, 1]])), 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    expected = model(**whole).logits[:, 5:]
    model(**batch, **{CACHE: cache})
    layers, fused = settings.num_hidden_layers, len(settings.cross_attention_layers)
    assert cache.get_seq_length() == 5 and len(cache.layers) == layers + fused
    visual = cache.layers[layers:]
    tokens = settings.num_query_tokens or 4 * 5
    head_dim = settings.language_projection_dim // settings.num_attention_heads
    assert all(
        type(layer) is VisualLayer and layer.keys.shape == (2, settings.num_key_value_heads, tokens, head_dim)
        for layer in visual
    )
    memory = [(layer.keys, layer.values) for layer in visual]
    for i in range(3):
        out = model(
            input_ids=whole["input_ids"][:, 5 + i : 6 + i],
            attention_mask=whole["attention_mask"][:, : 6 + i],
            **{CACHE: cache},
        )
        assert torch.allclose(out.logits, expected[:, i : i + 1], rtol=1e-3, atol=2e-4)
        assert cache.get_seq_length() == 6 + i
    assert all(layer.keys is keys and layer.values is values for layer, (keys, values) in zip(visual, memory))


def _copied(cache):
    return copy.deepcopy(cache)


def _pickled(cache):
    return pickle.loads(pickle.dumps(cache))


def filled(model, batch) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(**batch, **{CACHE: cache})
    return cache


@torch.no_grad()
def step(model, cache, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor(ids)[:, None], **{CACHE: cache}).logits


@pytest.mark.parametrize("branch", [_copied, _pickled])
@torch.no_grad()
def test_branches_of_a_cache(model, branch):
    cache = filled(model, inputs(5, 5))
    other = branch(cache)
    expected = step(model, cache, [4, 5])
    assert torch.equal(step(model, other, [4, 5]), expected)


@torch.no_grad()
def test_rows_of_a_cache_are_reordered_repeated_and_selected(model):
    """Rows with images of different sizes: keys, values and lengths are reordered together."""
    batch = ragged()
    batch["input_ids"], batch["attention_mask"] = inputs(5, 5, 5, image=None).values()
    expected = step(model, filled(model, batch), [4, 5, 6])

    cache = filled(model, batch)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.allclose(step(model, cache, [6, 4, 5]), expected[[2, 0, 1]], atol=1e-5)
    cache = filled(model, batch)
    cache.batch_repeat_interleave(2)
    assert torch.allclose(step(model, cache, [4, 4, 5, 5, 6, 6]), expected.repeat_interleave(2, 0), atol=1e-5)
    cache = filled(model, batch)
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert torch.allclose(step(model, cache, [5, 6]), expected[1:], atol=1e-5)


@torch.no_grad()
def test_crop_keeps_the_image_and_reset_drops_it(model):
    batch = inputs(5)
    cache = filled(model, batch)
    expected = step(model, cache, [4])
    # transformers 5.17 crops to a length, 5.23 by a number; negative numbers mean the same to both.
    cache.crop(-1)
    assert cache.get_seq_length() == 4 + 1 and torch.allclose(step(model, cache, [4]), expected, atol=1e-5)

    static = StaticCache(config=model.config, max_cache_len=12)
    first = model(**batch, **{CACHE: static}).logits
    assert holds_images(static, model.config.num_hidden_layers)
    static.reset()
    assert not holds_images(static, model.config.num_hidden_layers)
    assert torch.equal(model(**batch, **{CACHE: static}).logits, first)
    static.reset()
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.allclose(model(**text, **{CACHE: static}).logits, model(**text).logits, atol=1e-5)


@torch.no_grad()
def test_a_image_after_text(model):
    """Text before the image does not attend to it; later text does."""
    batch = inputs(5)
    cache = DynamicCache(config=model.config)
    text = model(input_ids=torch.tensor([[7, 8]]), **{CACHE: cache})
    out = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], **{CACHE: cache})
    assert cache.get_seq_length() == 7 and holds_images(cache, model.config.num_hidden_layers)
    assert not torch.allclose(
        out.logits, model(input_ids=batch["input_ids"], **{CACHE: text_cache(model)}).logits, atol=1e-3
    )
    assert text.logits.isfinite().all()
    with pytest.raises(ValueError, match="already holds images"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], **{CACHE: cache})


def text_cache(model) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[7, 8]]), **{CACHE: cache})
    return cache


def test_a_second_turn_goes_on_with_the_cache(model):
    batch, cache = inputs(5), DynamicCache(config=model.config)
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    first = model.generate(**batch, **options, **{CACHE: cache})
    ids = torch.cat((first, torch.tensor([[3, 4, 5]])), 1)
    expected = model.generate(input_ids=ids, pixel_values=batch["pixel_values"], **options)
    again = copy.deepcopy(cache)
    assert torch.equal(model.generate(input_ids=ids, **{CACHE: cache}, **options), expected)
    with pytest.raises(ValueError, match="already holds images"):  # rather than silently ignored
        model.generate(input_ids=ids, pixel_values=batch["pixel_values"], **{CACHE: again}, **options)


def test_an_assistant_model(models, model):
    plain = models["attention" if "attention" in model.config.connector_type else "mlp", "plain"]
    batch = inputs(6)
    assert torch.equal(generated(model, batch, assistant_model=copy.deepcopy(plain)), by_hand(model, batch, 6))


@pytest.mark.parametrize("name", NAMES)
def test_every_decoding_step_is_fused(models, name):
    model = models[name, "accelerated"]
    with fused_calls(model) as calls:
        generated(model, inputs(6, 4), steps=5)
    settings = model.config
    assert calls.fused == {
        "decoder_layer": 5 * settings.num_hidden_layers,
        "vision_block": settings.vision_num_hidden_layers,
    }


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_states_of_generate(models, name):
    plain, fast = (models[name, kind] for kind in KINDS)
    options = dict(
        max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_hidden_states=True, output_logits=True
    )
    one, other = (model.generate(**inputs(5), **options) for model in (plain, fast))
    for a, b in zip(one.hidden_states, other.hidden_states):
        assert len(a) == len(b) == plain.config.num_hidden_layers + 1
        assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(a, b))
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(one.logits, other.logits))


def test_generation_stops_at_the_end_token(model):
    batch = inputs(5)
    tokens = by_hand(model, batch, 6)[0].tolist()
    end = tokens[2]
    out = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=end)
    assert out[0, 5:].tolist() == tokens[: tokens.index(end) + 1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_tokens_are_steps(models, monkeypatch, name, batch):
    """All layers between two cross-attentions are one call; logits and caches equal the stock model's."""
    seen, run = [], CpuStep.run
    monkeypatch.setattr(CpuStep, "run", lambda *args: seen.append(1) or run(*args))
    outs = [
        models[name, kind].generate(
            **batch, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        for kind in KINDS
    ]
    plain, ours = outs
    assert torch.equal(ours.sequences, plain.sequences) and len(seen) == len(ours.logits) - 1
    assert_close(torch.stack(ours.logits), torch.stack(plain.logits))
    for got, expected in zip(ours[CACHE].layers, plain[CACHE].layers, strict=True):
        assert type(got) is type(expected) and got.get_seq_length() == expected.get_seq_length()
        if expected.keys is not None:
            assert_close(got.keys, expected.keys)
