"""Decode steps of the GPU, here without CUDA graphs on CPU tensors, equal stock in every use of ``generate``."""

import copy
import threading

import pytest
import torch
from generation_runs import ENDS, GREEDY, Tokens, generate, same_cache
from gpu_steps import begun, idle, offer
from models import assert_close, inputs, pair
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, StaticCache
from transformers.generation import LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation import logits_process as processors
from transformers.models.qwen3_vl import modeling_qwen3_vl

import qvl_model
from qvl_model.compat import CACHE
from qvl_model.generation import step_gpu

ROWS = {
    "text": [[9]],
    "ends with an image": [[3, (1, 4, 6)]],
    "video": [[3, (3, 4, 6), 4]],
    "batch 3, padding and images": [[3, (1, 4, 6), 5], [4], [2, (1, 2, 2), 3, (1, 8, 4), 1]],
}


OPTIONS = {
    "greedy": GREEDY,
    "ends early": GREEDY | ENDS,
    "repetition penalty": GREEDY | dict(repetition_penalty=1.7),
    "minimum length": GREEDY | dict(min_new_tokens=6, eos_token_id=list(range(0, 160, 2)), pad_token_id=0),
    "sampling": dict(do_sample=True, temperature=1.3, top_k=40, top_p=0.95, max_new_tokens=12),
    "sampling, ends early": dict(do_sample=True, temperature=2.5, top_k=0, min_p=0.01, max_new_tokens=30) | ENDS,
}


@pytest.fixture
def models(models, monkeypatch):
    offer(monkeypatch)
    return models


@pytest.fixture
def steps(monkeypatch):
    """Every step that began."""
    return begun(monkeypatch)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", ROWS)
def test_same_as_stock(models, steps, rows, options):
    """Tokens, the returned cache, and the random numbers that come next."""
    batch, outs = inputs(*ROWS[rows]), []
    for model in models:
        out = generate(model, batch, return_dict_in_generate=True, **OPTIONS[options])
        outs.append((out.sequences, out[CACHE], torch.rand(3)))
    (expected, expected_cache, expected_next), (sequences, cache, following) = outs
    assert torch.equal(sequences, expected) and torch.equal(following, expected_next)
    same_cache(cache, expected_cache)
    assert len(steps) <= 1 and (steps or options.endswith("ends early"))


def test_streamer_sees_the_same(models):
    streamers = [Tokens(), Tokens()]
    for model, streamer in zip(models, streamers):
        generate(model, inputs([5]), streamer=streamer, do_sample=True, max_new_tokens=40, **ENDS)
    assert streamers[1].seen == streamers[0].seen and streamers[1].ended == streamers[0].ended == 1


CHOSEN_BY_PROCESSORS = {
    "scores and logits": dict(output_scores=True, output_logits=True),
    "a limit of time": dict(stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(1e9)])),
    "another processor": dict(logits_processor=LogitsProcessorList([processors.NoRepeatNGramLogitsProcessor(2)])),
    "several sequences": dict(num_return_sequences=3, do_sample=True, output_scores=True),
}


@pytest.mark.parametrize("name", CHOSEN_BY_PROCESSORS)
def test_tokens_that_no_graph_chooses(models, steps, name):
    batch, options = inputs([5], [3]), GREEDY | CHOSEN_BY_PROCESSORS[name]
    expected, out = (generate(model, batch, **options, return_dict_in_generate=True) for model in models)
    assert len(steps) == 1 and torch.equal(out.sequences, expected.sequences)
    for values in ("scores", "logits"):
        assert (getattr(out, values) is None) == (getattr(expected, values) is None)
        for ours, stock in zip(getattr(out, values) or (), getattr(expected, values) or ()):
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)  # -inf of top-k among them


def test_other_calls_stay_with_stock_code(models, steps):
    stock, ours = models
    batch = inputs([5])
    expected = generate(stock, batch, **GREEDY)
    static = StaticCache(config=ours.config.text_config, max_cache_len=20)
    handle = ours.model.language_model.norm.register_forward_hook(lambda *_: None)
    assert torch.equal(generate(ours, batch, **GREEDY), expected)
    handle.remove()
    for options in ({CACHE: static}, dict(use_cache=False)):
        assert torch.equal(generate(ours, batch, **options, **GREEDY), expected)
    assert not steps


def test_returned_cache_goes_on_to_the_next_turn(models, steps):
    """With the whole text, and with the new tokens only."""
    for whole in (True, False):
        results = []
        for model in models:
            out = generate(model, inputs([3, (1, 4, 6), 4]), return_dict_in_generate=True, **GREEDY)
            turn = torch.cat((out.sequences, torch.tensor([[5, 6, 7]])), 1)
            new = turn if whole else turn[:, out[CACHE].get_seq_length() :]
            again = generate(
                model,
                dict(input_ids=new, attention_mask=torch.ones_like(turn)),
                **{CACHE: out[CACHE]},
                do_sample=False,
                max_new_tokens=6,
                return_dict_in_generate=True,
            )
            results.append((out.sequences, again.sequences, again[CACHE]))
        (expected, expected_again, expected_cache), (sequences, again, cache) = results
        assert torch.equal(sequences, expected) and torch.equal(again, expected_again)
        same_cache(cache, expected_cache)
    assert len(steps) == 4


def test_a_layer_with_fewer_keys_than_the_others(models, steps):
    """As a turn of a single token leaves the cache; stock needs no mask for it."""
    outs = []
    for model in models:
        cache = step_gpu.DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            model(**inputs([6]), **{CACHE: cache})
        layer = cache.layers[2]
        layer.keys, layer.values = layer.keys[:, :, :4], layer.values[:, :, :4]
        turn = dict(input_ids=torch.tensor([[7]]), attention_mask=torch.ones(1, 7, dtype=torch.long))
        outs.append(generate(model, turn, **{CACHE: cache}, return_dict_in_generate=True, output_logits=True, **GREEDY))
    assert torch.equal(outs[0].sequences, outs[1].sequences) and not steps
    assert_close(torch.stack(outs[1].logits), torch.stack(outs[0].logits))


def test_a_model_changed_between_tokens(models, steps):
    """A user's streamer changes the model: stock code continues from there."""
    outs = []
    for model in map(copy.deepcopy, models):
        norm = model.model.language_model.norm
        changed = Tokens(once=lambda norm=norm: setattr(norm, "weight", torch.nn.Parameter(-norm.weight)))
        outs.append(generate(model, inputs([5], [2]), streamer=changed, return_dict_in_generate=True, **GREEDY))
    assert torch.equal(outs[0].sequences, outs[1].sequences) and len(steps) == 1
    same_cache(outs[1][CACHE], outs[0][CACHE], strides=False)


def test_report_says_which_modes_are_captured(models, monkeypatch):
    text = qvl_model.report(models[1]).decoding
    assert (
        text.startswith("whole steps as CUDA graphs")
        and "greedy and sampling" in text
        and "other loops: all layers of a token" in text
    )
    assert "CUDA graphs" not in qvl_model.report(models[1].model).decoding
    monkeypatch.undo()
    assert "CUDA graphs" not in qvl_model.report(models[1]).decoding


def test_a_streamer_that_generates_has_a_step_of_its_own(models, steps):
    """Whether new steps are captured or earlier ones are reused."""
    stock, ours = models
    first, second = inputs([5]), inputs([8], seed=1)
    for _ in range(2):
        inner = []
        out = ours.generate(
            **first, streamer=Tokens(once=lambda: inner.append(ours.generate(**second, **GREEDY))), **GREEDY
        )
        assert torch.equal(out, stock.generate(**first, **GREEDY)) and torch.equal(
            inner[0], stock.generate(**second, **GREEDY)
        )
    assert len({id(step) for step in steps}) == 2 == len(idle(ours))


def test_two_threads_have_steps_of_their_own(models, steps):
    """Both are in the middle of their tokens at the same time."""
    stock, ours = models
    batches, outs, barrier = [inputs([5]), inputs([8], seed=1)], {}, threading.Barrier(2, timeout=60)

    def work(index):
        outs[index] = ours.generate(**batches[index], streamer=Tokens(once=barrier.wait), **GREEDY)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, batch in enumerate(batches):
        assert torch.equal(outs[index], stock.generate(**batch, **GREEDY))
    assert len({id(step) for step in steps}) == 2


@pytest.mark.parametrize("kept", [True, False], ids=["the caller's cache", "no cache of the caller's"])
def test_an_exception_of_a_streamer_leaves_cache_and_model_usable(models, kept):
    stock, ours = models
    results = []

    def stop():
        raise KeyboardInterrupt

    for model in models:
        cache = step_gpu.DynamicCache(config=model.config.text_config) if kept else None
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs([5]), streamer=Tokens(once=stop), **GREEDY, **({CACHE: cache} if kept else {}))
        results.append((cache, generate(model, inputs([7]), **GREEDY)))
    (expected_cache, expected), (cache, out) = results
    assert torch.equal(out, expected) and len(idle(ours)) == 1
    if kept:
        same_cache(cache, expected_cache, strides=False)


@pytest.mark.parametrize(
    ("batch", "rows"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (16, 16), (17, 24), (32, 32), (33, 40)]
)
def test_rows_of_a_step(batch, rows):
    assert step_gpu._rows(batch) == rows


def test_a_step_of_inference_mode_serves_outside_of_it(models, steps):
    stock, ours = models
    with torch.inference_mode():
        generate(ours, inputs([6]), do_sample=True, max_new_tokens=5)
    batch, options = inputs([7]), dict(do_sample=True, max_new_tokens=9)
    assert torch.equal(generate(ours, batch, **options), generate(stock, batch, **options))
    assert steps[0] is steps[1]


def _own_update(model, cache):
    cache.layers[1].update = lambda k, v, *args, update=cache.layers[1].update, **kwargs: update(
        k * 0.5, v, *args, **kwargs
    )


def _own_attention(model, cache):
    functions = modeling_qwen3_vl.ALL_ATTENTION_FUNCTIONS
    theirs = functions["sdpa"]
    functions["sdpa"] = lambda module, q, k, v, *args, **kwargs: theirs(module, q, k, v * 0.5, *args, **kwargs)


def _plain_tensor(model, cache):
    norm = model.model.language_model.norm
    value = norm.weight.detach() * 1.5
    del norm.weight
    norm.weight = value


def _plain_frequencies(model, cache):
    rotary = model.model.language_model.rotary_emb
    value = rotary.inv_freq * 0.5
    del rotary.inv_freq
    rotary.inv_freq = value


def _first_layer_lost(model, cache):
    del model.model.language_model.layers[0]


@pytest.mark.parametrize("change", [_own_update, _own_attention, _plain_tensor, _plain_frequencies, _first_layer_lost])
def test_what_no_graph_can_follow_stays_with_stock_code(monkeypatch, steps, change):
    offer(monkeypatch)
    mapping = modeling_qwen3_vl.ALL_ATTENTION_FUNCTIONS
    outs = []
    for model in pair("odd"):
        before = generate(model, inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True)
        begun = len(steps)
        cache = DynamicCache(config=model.config.text_config)
        with monkeypatch.context() as patch:
            patch.setattr(mapping, "_local_mapping", dict(mapping._local_mapping))
            change(model, cache)
            outs.append(
                generate(
                    model, inputs([9]), **GREEDY, **{CACHE: cache}, return_dict_in_generate=True, output_logits=True
                )
            )
    assert torch.equal(outs[0].sequences, outs[1].sequences) and begun and len(steps) == begun
    assert_close(torch.stack(outs[1].logits), torch.stack(outs[0].logits))
    assert (torch.stack(outs[0].logits) - torch.stack(before.logits)).abs().max() > 1e-3


def test_under_a_mode(models, steps):
    class Halved(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return out * 0.5 if function is torch.nn.functional.linear else out

    generate(models[1], inputs([9]), **GREEDY)
    with Halved():
        stock, ours = (
            generate(model, inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True) for model in models
        )
    assert torch.equal(ours.sequences, stock.sequences) and len(steps) == 1
    assert_close(torch.stack(ours.logits), torch.stack(stock.logits))


def test_a_custom_loop_finds_its_cache_whole(models):
    """A ``custom_generate`` that keeps the cache which ``generate`` made."""
    results = []
    for model in models:
        kept = []

        def custom(model, input_ids, logits_processor, stopping_criteria, generation_config, kept=kept, **options):
            kept.append(options[CACHE])
            return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **options)

        out = generate(model, inputs([9], [4]), **GREEDY, custom_generate=custom)
        results.append((out, kept[0]))
    (expected, expected_cache), (out, cache) = results
    assert torch.equal(out, expected)
    same_cache(cache, expected_cache, strides=False)
