"""``generate`` on the CPU by decode steps equals stock, for every option."""

import copy
import threading
import time

import pytest
import torch
from gpu_steps import begun, offer
from models import assert_close, inputs, pair, relative
from transformers import DynamicCache, StaticCache, masking_utils
from transformers.cache_utils import DynamicLayer
from transformers.generation import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer, TextStreamer
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

import qvl_model
from qvl_model import digits
from qvl_model.compat import CACHE
from qvl_model.generation import loop
from qvl_model.generation.step_cpu import CpuStep
from qvl_model.processing import load_processor

ROWS = {
    "text": [[9]],
    "one token": [[1]],
    "image": [[3, (1, 4, 6), 4]],
    "ends with an image": [[3, (1, 4, 6)]],
    "video": [[3, (3, 4, 6), 4]],
    "batch 3, left padding": [[9], [1], [7]],
    "batch 3, padding and images": [[3, (1, 4, 6), 5], [4], [2, (1, 2, 2), 3, (1, 8, 4), 1]],
}
GREEDY = dict(do_sample=False, max_new_tokens=12)
ENDS = dict(eos_token_id=list(range(0, 160, 7)), pad_token_id=0)


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


def _generate(model, batch, **options):
    torch.manual_seed(3)
    return model.generate(**batch, **options)


def _same(models, batch, **options):
    """Asserts that tokens, scores, logits and caches agree; returns both outputs."""
    outs = [
        _generate(
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
    _, ours = _same(models, inputs(*ROWS[rows]), **OPTIONS[options])
    assert len(tokens) == len(ours.scores) - 1  # all but the first, which prefill gives


class _Scaled(Qwen3VLTextRotaryEmbedding):
    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        scale = 1 + position_ids.max() / 10
        return (cos * scale).to(x.dtype), (sin * scale).to(x.dtype)


def test_tables_that_depend_on_all_positions(models, tokens):
    for model in models:
        model.model.language_model.rotary_emb.__class__ = _Scaled
    _same(models, inputs([9]), **GREEDY)
    assert tokens


@pytest.mark.parametrize("kept", ["dense", "int8"])
def test_another_default_device(tokens, kept):
    """Nothing that a step makes lands on the device that the user prefers for new tensors."""
    models = pair("odd")
    if kept == "int8":
        models = [qvl_model.accelerate(copy.deepcopy(models[0]), weights="int8") for _ in models]
    batch = inputs([9])
    expected = _generate(models[0], batch, **GREEDY)
    with torch.device("meta"):
        out = models[1].generate(**batch, **GREEDY)
    assert torch.equal(out, expected) and tokens


class _Tokens(BaseStreamer):
    def __init__(self, each=lambda: None):
        self.seen, self.ended, self._each = [], 0, each

    def put(self, value):
        self.seen.append(value.tolist())
        if len(self.seen) > 2:
            self._each()

    def end(self):
        self.ended += 1


def test_streamer_sees_the_same(models, tokens):
    streamers = [_Tokens() for _ in models]
    for model, streamer in zip(models, streamers):
        _generate(model, inputs([9]), **GREEDY, streamer=streamer)
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
        out = _generate(model, inputs([9]), do_sample=False, max_new_tokens=60, max_time=limit, streamer=streamer)
        assert streamer.seen == out[0].tolist()
        seen.append(streamer.seen[9:])
        assert 1 <= len(seen[-1]) <= 5 and streamer.ended - streamer.after[0] > limit  # the first is the prompt
        assert len(seen[-1]) < 3 or streamer.after[-3] - streamer.before[1] <= limit  # checked before or after a put
    shared = min(map(len, seen))
    assert seen[0][:shared] == seen[1][:shared]


def test_two_threads_share_a_model(models, tokens):
    stock, ours = models
    batches = [inputs([n]) for n in (5, 9, 3, 12)]
    expected = [_generate(stock, batch, **GREEDY) for batch in batches]
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
        streamer = _Tokens(
            lambda model=model, inner=inner: inner.append(model.generate(**inputs([4]), **GREEDY).tolist())
        )
        results.append((_generate(model, inputs([9]), **GREEDY, streamer=streamer).tolist(), inner))
    assert results[0] == results[1] and len(results[1][1]) > 3


def test_next_turns(models, tokens):
    """A kept cache continues with all ids, or with the new ids alone and the mask of all."""
    text = inputs([30])["input_ids"]
    for alone in (False, True):
        caches = [DynamicCache(), DynamicCache()]
        results = []
        for model, cache in zip(models, caches):
            model.model.rope_deltas = None
            first = _generate(
                model,
                {"input_ids": text[:, :9], "attention_mask": torch.ones(1, 9, dtype=torch.long)},
                **{CACHE: cache},
                **GREEDY,
            )
            asked = torch.cat((first, text[:, 9:14]), 1)
            mask = torch.ones(1, asked.shape[1], dtype=torch.long)
            new = asked[:, cache.get_seq_length() :] if alone else asked
            second = _generate(model, {"input_ids": new, "attention_mask": mask}, **{CACHE: cache}, **GREEDY)
            results.append((first.tolist(), second.tolist(), cache.get_seq_length()))
        assert results[0] == results[1]
        for ours, stock in zip(caches[1].layers, caches[0].layers, strict=True):
            assert_close(ours.keys, stock.keys)
    assert tokens


@pytest.mark.parametrize("rows", [[[9]], [[9], [4]]], ids=["one row", "left padding"])
def test_prefill_in_chunks(models, steps, rows):
    options = GREEDY | dict(prefill_chunk_size=4)
    try:
        _generate(models[0], inputs(*rows), **options, **{CACHE: DynamicCache()})
    except (RuntimeError, ValueError) as error:  # transformers 5.17's own chunks do not fit its positions
        with pytest.raises(type(error)):
            _generate(models[1], inputs(*rows), **options, **{CACHE: DynamicCache()})
        return
    _same(models, inputs(*rows), **options, **{CACHE: DynamicCache()})
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
    _same(models, batch, **GREEDY)
    assert steps


def test_embeddings_as_prompt(models, tokens):
    ids = inputs([9])["input_ids"]
    outs = [
        _generate(model, {"inputs_embeds": model.get_input_embeddings()(ids).detach()}, **GREEDY) for model in models
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
            _generate(model, inputs([9]), **GREEDY, **{CACHE: cache}, streamer=_Tokens(_raise_at(3)))
        results.append((cache.get_seq_length(), cache.layers[0].keys, _generate(model, inputs([9]), **GREEDY).tolist()))
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
    stock, _ = _same(models, inputs([9], [4]), **GREEDY, logits_processor=[_Favour()], stopping_criteria=[_Until(15)])
    assert stock.sequences.shape[1] == 15 and tokens


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
        before = _generate(model, inputs([9]), **options)
        done = []
        if when == "between calls":
            CHANGES[change](model)
            outs.append(_generate(model, inputs([9]), **options))
        else:
            streamer = _Tokens(lambda model=model, done=done: done or done.append(CHANGES[change](model)))
            outs.append(_generate(model, inputs([9]), **options, streamer=streamer))
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
        outs.append(_generate(model, inputs([9]), **options, streamer=streamer))
        assert len(calls) > 3
    stock, ours = outs
    assert_close(torch.stack(ours.logits), torch.stack(stock.logits))


def test_two_models_take_turns(tokens):
    one, other = pair("odd"), pair("small")
    outs = [
        [_generate(model, inputs([n]), **GREEDY).tolist() for n in (5, 7) for model in (one[i], other[i])]
        for i in (0, 1)
    ]
    assert outs[0] == outs[1] and tokens


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights(tokens, weights):
    """As by the model's own forward, token by token."""
    _, ours = pair("odd")
    qvl_model.accelerate(ours, weights=weights, group=32)
    out = _generate(ours, inputs([9], [4]), **GREEDY)
    assert len(tokens) == GREEDY["max_new_tokens"] - 1
    ours.model.language_model.register_forward_hook(lambda *_: None)
    assert torch.equal(out, _generate(ours, inputs([9], [4]), **GREEDY)) and len(tokens) == GREEDY["max_new_tokens"] - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(tokens, dtype):
    """As by the model's own forward, token by token."""
    _, ours = pair("odd", dtype)
    out = _generate(ours, inputs([9], [4]), **GREEDY)
    ours.model.language_model.register_forward_hook(lambda *_: None)
    assert torch.equal(out, _generate(ours, inputs([9], [4]), **GREEDY)) and len(tokens) == GREEDY["max_new_tokens"] - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype):
    outs = []
    for model in pair("odd"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(_generate(model, inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True))
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
            _generate(
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
        first = _generate(model, inputs([9]), **GREEDY, **{CACHE: cache})
        asked = torch.cat((first, inputs([4])["input_ids"]), 1)
        second = _generate(
            model, {"input_ids": asked, "attention_mask": torch.ones_like(asked)}, **GREEDY, **{CACHE: cache}
        )
        results.append((first.tolist(), second.tolist(), int(cache.get_seq_length())))
    assert results[0] == results[1] and tokens


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
        streamer = _Tokens(replace) if when == "by a streamer" else None
        results.append(
            _generate(
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
    plain = _generate(models[0], inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert relative(torch.stack(stock.logits), torch.stack(plain.logits)) > 1e-3


def test_an_update_of_a_class(models, monkeypatch):
    plain = _generate(models[0], inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True)
    update = DynamicLayer.update
    monkeypatch.setattr(
        DynamicLayer, "update", lambda layer, k, v, *args, **kwargs: update(layer, k * 0.5, v, *args, **kwargs)
    )
    stock, _ = _same(models, inputs([9]), **GREEDY)
    assert relative(torch.stack(stock.logits), torch.stack(plain.logits)) > 1e-3


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
    expected = _generate(stock, inputs(*ROWS[rows]), **options)
    _set_implementation(ours, name)
    got = _generate(ours, inputs(*ROWS[rows]), **options)
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
        before = _generate(model, inputs([9]), **options)
        module = model.get_submodule(place)
        module.__class__ = type("Flipped", (_Flipped, type(module)), {"__module__": __name__})
        out = _generate(model, inputs([9]), **options)
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
        outs.append(_generate(model, inputs([9], [4]), **GREEDY, return_dict_in_generate=True, output_logits=True))
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
        _generate(model, inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True) for model in models
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
        outs.append(_generate(model, inputs([9]), **options))
    assert_close(torch.stack(outs[1].logits), torch.stack(outs[0].logits))


def test_memory_of_weights_that_are_swapped_meanwhile_stays():
    """For example by another thread: memory that a step reads is not freed."""
    _, ours = pair("odd")
    weight = _layer(ours, 1).mlp.up_proj.weight
    step = CpuStep.begin(ours, _filled(ours), torch.full((3, 1, 1), 5), None, foreign=False)
    address, expected = weight.data_ptr(), weight.clone()
    weight.data = weight.data * 0.5
    (kept,) = [x for x in step._alive if x.data_ptr() == address]
    assert torch.equal(kept, expected)


def _filled(model) -> DynamicCache:
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), **{CACHE: cache})
    return cache


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
        out = _generate(
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


def test_a_static_cache_that_is_too_short(models):
    results = []
    for model in models:
        cache = StaticCache(config=model.config.text_config, max_cache_len=12)
        with pytest.raises((RuntimeError, IndexError, ValueError)) as caught:
            _generate(model, inputs([9]), **GREEDY, **{CACHE: cache})
        results.append((caught.type, int(cache.get_seq_length())))
    assert results[0] == results[1]


def test_gradients_of_a_kept_cache():
    grads = []
    for model in pair("odd"):
        model.requires_grad_(False)
        cache = _filled(model)
        keys = [layer.keys.requires_grad_(True) for layer in cache.layers]
        model(input_ids=torch.tensor([[5]]), **{CACHE: cache}).logits.square().sum().backward()
        grads.append(torch.stack([x.grad for x in keys]))
    assert_close(grads[1], grads[0])
