"""``generate`` on the CPU by decode steps equals stock, for every option."""

import copy
import threading
import time

import pytest
import torch
from generation_runs import ENDS, GREEDY, Tokens, filled_cache, generate, same_runs
from gpu_steps import begun, offer
from models import assert_close, inputs, pair
from transformers import DynamicCache, StaticCache
from transformers.generation import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

import qvl_model
from qvl_model.compat import CACHE
from qvl_model.generation import loop
from qvl_model.generation.step_cpu import CpuStep

ROWS = {
    "text": [[9]],
    "one token": [[1]],
    "image": [[3, (1, 4, 6), 4]],
    "ends with an image": [[3, (1, 4, 6)]],
    "video": [[3, (3, 4, 6), 4]],
    "batch 3, left padding": [[9], [1], [7]],
    "batch 3, padding and images": [[3, (1, 4, 6), 5], [4], [2, (1, 2, 2), 3, (1, 8, 4), 1]],
}


@pytest.fixture
def tokens(monkeypatch):
    """The number of decode steps that ``CpuStep`` has run."""
    seen, run = [], CpuStep.run
    monkeypatch.setattr(CpuStep, "run", lambda *args: seen.append(1) or run(*args))
    return seen


@pytest.fixture(params=["CPU step", "GPU step"])
def steps(request, tokens, monkeypatch):
    """What the step of the device has run: tokens, or the steps that began on the GPU, here without graphs."""
    if request.param == "CPU step":
        return tokens
    offer(monkeypatch)
    return begun(monkeypatch)


OPTIONS = {
    "greedy": GREEDY,
    "one new token": GREEDY | dict(max_new_tokens=1),
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, max_new_tokens=12),
    "ends early": GREEDY | ENDS,
    "penalties": GREEDY | dict(repetition_penalty=1.7, no_repeat_ngram_size=2, bad_words_ids=[[5], [7]]),
    "minimum length": GREEDY | ENDS | dict(min_new_tokens=6),
    "several sequences": dict(do_sample=True, num_return_sequences=2, max_new_tokens=8),
    "max time": GREEDY | dict(max_time=60.0),
    "static cache": GREEDY | dict(cache_implementation="static", disable_compile=True),
    "many tokens": GREEDY | dict(max_new_tokens=80),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", ROWS)
def test_as_stock(models, tokens, rows, options):
    _, ours = same_runs(models, inputs(*ROWS[rows]), **OPTIONS[options])
    assert len(tokens) == len(ours.scores) - 1  # all but the first, which prefill gives


class _Scaled(Qwen3VLTextRotaryEmbedding):
    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        scale = 1 + position_ids.max() / 10
        return (cos * scale).to(x.dtype), (sin * scale).to(x.dtype)


def test_tables_that_depend_on_all_positions(models, tokens):
    for model in models:
        model.model.language_model.rotary_emb.__class__ = _Scaled
    same_runs(models, inputs([9]), **GREEDY)
    assert tokens


@pytest.mark.parametrize("kept", ["dense", "int8"])
def test_another_default_device(tokens, kept):
    """Nothing that a step makes lands on the device that the user prefers for new tensors."""
    models = pair("odd")
    if kept == "int8":
        models = [qvl_model.accelerate(copy.deepcopy(models[0]), weights="int8") for _ in models]
    batch = inputs([9])
    expected = generate(models[0], batch, **GREEDY)
    with torch.device("meta"):
        out = models[1].generate(**batch, **GREEDY)
    assert torch.equal(out, expected) and tokens


def test_streamer_sees_the_same(models, tokens):
    streamers = [Tokens() for _ in models]
    for model, streamer in zip(models, streamers):
        generate(model, inputs([9]), **GREEDY, streamer=streamer)
    assert streamers[0].seen == streamers[1].seen and streamers[1].ended == 1 and tokens


class _Slow(BaseStreamer):
    """Sleeps at each token; keeps tokens and the time before and after each."""

    def __init__(self):
        self.seen, self.before, self.after = [], [], []

    def put(self, value):
        self.before.append(time.time())
        self.seen += value.reshape(-1).tolist()
        time.sleep(0.1)
        self.after.append(time.time())

    def end(self):
        self.ended = time.time()


def test_time_is_over(models, steps):
    """``max_time`` ends generation after the first token that is late, and not before; true on a slow machine too."""
    seen, limit = [], 0.4
    for model in models:
        streamer = _Slow()
        out = generate(model, inputs([9]), do_sample=False, max_new_tokens=60, max_time=limit, streamer=streamer)
        assert streamer.seen == out[0].tolist()
        seen.append(streamer.seen[9:])
        assert 1 <= len(seen[-1]) <= 5 and streamer.ended - streamer.after[0] > limit  # the first is the prompt
        assert len(seen[-1]) < 3 or streamer.after[-3] - streamer.before[1] <= limit  # checked before or after a put
    shared = min(map(len, seen))
    assert seen[0][:shared] == seen[1][:shared]


def test_two_threads_share_a_model(models, tokens):
    stock, ours = models
    batches = [inputs([n]) for n in (5, 9, 3, 12)]
    expected = [generate(stock, batch, **GREEDY) for batch in batches]
    for _ in range(3):
        got = [None] * len(batches)
        threads = [
            threading.Thread(target=lambda i=i: got.__setitem__(i, ours.generate(**batches[i], **GREEDY)))
            for i in range(len(batches))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(map(torch.equal, got, expected))
    assert tokens


def test_a_streamer_that_generates(models):
    results = []
    for model in models:
        inner = []
        streamer = Tokens(
            lambda model=model, inner=inner: inner.append(model.generate(**inputs([4]), **GREEDY).tolist())
        )
        results.append((generate(model, inputs([9]), **GREEDY, streamer=streamer).tolist(), inner))
    assert results[0] == results[1] and len(results[1][1]) > 3


def test_next_turns(models, tokens):
    """A kept cache continues with all ids, or with the new ids alone and the mask of all."""
    text = inputs([30])["input_ids"]
    for alone in (False, True):
        caches = [DynamicCache(), DynamicCache()]
        results = []
        for model, cache in zip(models, caches):
            model.model.rope_deltas = None
            first = generate(
                model,
                {"input_ids": text[:, :9], "attention_mask": torch.ones(1, 9, dtype=torch.long)},
                **{CACHE: cache},
                **GREEDY,
            )
            asked = torch.cat((first, text[:, 9:14]), 1)
            mask = torch.ones(1, asked.shape[1], dtype=torch.long)
            new = asked[:, cache.get_seq_length() :] if alone else asked
            second = generate(model, {"input_ids": new, "attention_mask": mask}, **{CACHE: cache}, **GREEDY)
            results.append((first.tolist(), second.tolist(), cache.get_seq_length()))
        assert results[0] == results[1]
        for ours, stock in zip(caches[1].layers, caches[0].layers, strict=True):
            assert_close(ours.keys, stock.keys)
    assert tokens


@pytest.mark.parametrize("rows", [[[9]], [[9], [4]]], ids=["one row", "left padding"])
def test_prefill_in_chunks(models, steps, rows):
    options = GREEDY | dict(prefill_chunk_size=4)
    try:
        generate(models[0], inputs(*rows), **options, **{CACHE: DynamicCache()})
    except (RuntimeError, ValueError) as error:  # transformers 5.17's own chunks do not fit its positions
        with pytest.raises(type(error)):
            generate(models[1], inputs(*rows), **options, **{CACHE: DynamicCache()})
        return
    same_runs(models, inputs(*rows), **options, **{CACHE: DynamicCache()})
    assert steps


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("mask", ["right", "holes", "none"])
def test_other_masks_and_positions(models, steps, mask, positions):
    batch = inputs([9], [9])
    shown = torch.ones(2, 9, dtype=torch.long)
    if mask == "right":
        shown[1, 5:] = 0
    elif mask == "holes":
        shown[0, 2], shown[1, 4:6] = 0, 0
    batch["attention_mask"] = shown
    if mask == "none":
        del batch["attention_mask"]
    if positions:
        batch["position_ids"] = torch.arange(3, 12).expand(3, 2, -1)
    same_runs(models, batch, **GREEDY)
    assert steps


def test_embeddings_as_prompt(models, tokens):
    ids = inputs([9])["input_ids"]
    outs = [
        generate(model, {"inputs_embeds": model.get_input_embeddings()(ids).detach()}, **GREEDY) for model in models
    ]
    assert torch.equal(*outs) and tokens


def _raise_at(count):
    def each():
        nonlocal count
        count -= 1
        if count == 0:
            raise KeyboardInterrupt

    return each


def test_an_interruption_leaves_model_and_cache_usable(models):
    results = []
    for model in models:
        cache = DynamicCache()
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs([9]), **GREEDY, **{CACHE: cache}, streamer=Tokens(_raise_at(3)))
        results.append((cache.get_seq_length(), cache.layers[0].keys, generate(model, inputs([9]), **GREEDY).tolist()))
    assert results[0][0] == results[1][0] and results[0][2] == results[1][2]
    assert_close(results[1][1], results[0][1])


class _Favour(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + torch.linspace(0, 30, scores.shape[1]) * (input_ids.shape[1] % 2)


class _Until(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_processors_and_criteria_of_ones_own(models, tokens):
    stock, _ = same_runs(
        models, inputs([9], [4]), **GREEDY, logits_processor=[_Favour()], stopping_criteria=[_Until(15)]
    )
    assert stock.sequences.shape[1] == 15 and tokens


def test_two_models_take_turns(tokens):
    one, other = pair("odd"), pair("small")
    outs = [
        [generate(model, inputs([n]), **GREEDY).tolist() for n in (5, 7) for model in (one[i], other[i])]
        for i in (0, 1)
    ]
    assert outs[0] == outs[1] and tokens


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights(tokens, weights):
    """As by the model's own forward, token by token."""
    _, ours = pair("odd")
    qvl_model.accelerate(ours, weights=weights, group=32)
    out = generate(ours, inputs([9], [4]), **GREEDY)
    assert len(tokens) == GREEDY["max_new_tokens"] - 1
    ours.model.language_model.register_forward_hook(lambda *_: None)
    assert torch.equal(out, generate(ours, inputs([9], [4]), **GREEDY)) and len(tokens) == GREEDY["max_new_tokens"] - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(tokens, dtype):
    """As by the model's own forward, token by token."""
    _, ours = pair("odd", dtype)
    out = generate(ours, inputs([9], [4]), **GREEDY)
    ours.model.language_model.register_forward_hook(lambda *_: None)
    assert torch.equal(out, generate(ours, inputs([9], [4]), **GREEDY)) and len(tokens) == GREEDY["max_new_tokens"] - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype):
    outs = []
    for model in pair("odd"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(generate(model, inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True))
    assert_close(outs[1].logits[0], outs[0].logits[0], 2e-2)


class _Counting(DynamicCache):
    pass


REASONS = {
    "attentions": (dict(output_attentions=True, return_dict_in_generate=True), "attentions or hidden states"),
    "hidden states": (dict(output_hidden_states=True, return_dict_in_generate=True), "attentions or hidden states"),
    "no cache": (dict(use_cache=False), "cache"),
    "a cache of one's own": ({CACHE: _Counting}, "_Counting"),
}


@pytest.mark.parametrize("options", REASONS)
def test_other_calls_stay_with_stock_code(models, tokens, monkeypatch, options):
    given, expected = REASONS[options]
    reasons, original = [], loop.why_not
    monkeypatch.setattr(loop, "why_not", lambda *args: reasons.append(original(*args)) or reasons[-1])
    outs = []
    for model in models:
        if "output_attentions" in given:
            model.set_attn_implementation("eager")
        outs.append(
            generate(
                model,
                inputs([9]),
                **GREEDY,
                **{name: value() if isinstance(value, type) else value for name, value in given.items()},
            )
        )
        if "output_attentions" in given:
            model.set_attn_implementation("sdpa")
    sequences = [out if isinstance(out, torch.Tensor) else out.sequences for out in outs]
    assert torch.equal(*sequences) and not tokens and expected in reasons[0]


def test_a_static_cache_goes_on(models, tokens):
    results = []
    for model in models:
        cache = StaticCache(config=model.config.text_config, max_cache_len=48)
        first = generate(model, inputs([9]), **GREEDY, **{CACHE: cache})
        asked = torch.cat((first, inputs([4])["input_ids"]), 1)
        second = generate(
            model, {"input_ids": asked, "attention_mask": torch.ones_like(asked)}, **GREEDY, **{CACHE: cache}
        )
        results.append((first.tolist(), second.tolist(), int(cache.get_seq_length())))
    assert results[0] == results[1] and tokens


def _set_implementation(model, name: str) -> None:
    """As in a loaded config, without a check that the package is installed."""
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation = name


@pytest.mark.parametrize("rows", ["text", "batch 3, padding and images"])
@pytest.mark.parametrize(
    "name", ["eager", "flash_attention_2", "flash_attention_3", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
def test_implementations_of_attention(steps, tokens, name, rows):
    """As stock with sdpa; stock itself cannot run flash attention here."""
    stock, ours = pair("odd")
    options = GREEDY | dict(return_dict_in_generate=True, output_logits=True)
    expected = generate(stock, inputs(*ROWS[rows]), **options)
    _set_implementation(ours, name)
    got = generate(ours, inputs(*ROWS[rows]), **options)
    assert torch.equal(got.sequences, expected.sequences) and steps
    assert_close(torch.stack(got.logits), torch.stack(expected.logits))
    report = qvl_model.report(ours)
    assert f"text, {name}: " in report.attention and ("for prompts" in report.attention) == (name == "flex_attention")
    way = "all layers of a token in one call" if steps is tokens else "whole steps as CUDA graphs"
    assert report.decoding.startswith(way)


def test_several_texts_in_one_row_are_flash_attentions_own():
    _, ours = pair("odd")
    _set_implementation(ours, "flash_attention_2")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with (
        torch.no_grad(),
        pytest.raises((ImportError, TypeError, AttributeError, ValueError)),
    ):  # stock's function, which is not installed
        ours(input_ids=inputs([7])["input_ids"], position_ids=positions)


def test_report_says_why_not():
    stock, ours = pair("odd")
    assert (
        qvl_model.report(stock).decoding == "transformers' own loop"
        and qvl_model.report(stock).attention == "stock's own"
    )
    ours.model.language_model.register_forward_hook(lambda *_: None)
    assert "hooks" in qvl_model.report(ours).decoding
    _set_implementation(ours, "paged|sdpa")
    assert "nothing fused" in qvl_model.report(ours).attention


def test_a_static_cache_that_is_too_short(models):
    results = []
    for model in models:
        cache = StaticCache(config=model.config.text_config, max_cache_len=12)
        with pytest.raises((RuntimeError, IndexError, ValueError)) as caught:
            generate(model, inputs([9]), **GREEDY, **{CACHE: cache})
        results.append((caught.type, int(cache.get_seq_length())))
    assert results[0] == results[1]


def test_gradients_of_a_kept_cache():
    grads = []
    for model in pair("odd"):
        model.requires_grad_(False)
        cache = filled_cache(model)
        keys = [layer.keys.requires_grad_(True) for layer in cache.layers]
        model(input_ids=torch.tensor([[5]]), **{CACHE: cache}).logits.square().sum().backward()
        grads.append(torch.stack([x.grad for x in keys]))
    assert_close(grads[1], grads[0])
