"""Decode steps of the GPU, here without CUDA graphs on CPU tensors, equal stock in every use of ``generate``."""

import copy
import gc
import threading
import warnings
import weakref

import peft
import pytest
import torch
from gpu_steps import begun, offer
from models import assert_close, inputs, pair
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, StaticCache
from transformers.generation import LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation import logits_process as processors
from transformers.generation.streamers import BaseStreamer
from transformers.models.qwen3_vl import modeling_qwen3_vl

import qvl_model
from qvl_model.compat import CACHE
from qvl_model.generation import graphs, kv_cache, step_gpu
from qvl_model.generation.step_gpu import GpuStep, StepFailed

GREEDY = dict(do_sample=False, max_new_tokens=12)
ENDS = dict(eos_token_id=list(range(0, 160, 7)), pad_token_id=0)
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


def _generate(model, batch, **options):
    torch.manual_seed(3)
    return model.generate(**batch, **options)


def _idle(model) -> list[GpuStep]:
    return step_gpu._pools[model]._idle


def _same_cache(ours, stock, strides: bool = True) -> None:
    for layer, expected in zip(ours.layers, stock.layers):
        for name in ("keys", "values"):
            assert_close(getattr(layer, name), getattr(expected, name))
            assert not strides or getattr(layer, name).stride() == getattr(expected, name).stride()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", ROWS)
def test_same_as_stock(models, steps, rows, options):
    """Tokens, the returned cache, and the random numbers that come next."""
    batch, outs = inputs(*ROWS[rows]), []
    for model in models:
        out = _generate(model, batch, return_dict_in_generate=True, **OPTIONS[options])
        outs.append((out.sequences, out[CACHE], torch.rand(3)))
    (expected, expected_cache, expected_next), (sequences, cache, following) = outs
    assert torch.equal(sequences, expected) and torch.equal(following, expected_next)
    _same_cache(cache, expected_cache)
    assert len(steps) <= 1 and (steps or options.endswith("ends early"))


class _Tokens(BaseStreamer):
    """Records tokens, and calls a function at the second one."""

    def __init__(self, at=lambda: None):
        self.values, self.ended, self.at = [], 0, at

    def put(self, value):
        self.values.append(value.reshape(-1).tolist())
        if len(self.values) == 3:
            self.at()

    def end(self):
        self.ended += 1


def test_streamer_sees_the_same(models):
    streamers = [_Tokens(), _Tokens()]
    for model, streamer in zip(models, streamers):
        _generate(model, inputs([5]), streamer=streamer, do_sample=True, max_new_tokens=40, **ENDS)
    assert streamers[1].values == streamers[0].values and streamers[1].ended == streamers[0].ended == 1


CHOSEN_BY_PROCESSORS = {
    "scores and logits": dict(output_scores=True, output_logits=True),
    "a limit of time": dict(stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(1e9)])),
    "another processor": dict(logits_processor=LogitsProcessorList([processors.NoRepeatNGramLogitsProcessor(2)])),
    "several sequences": dict(num_return_sequences=3, do_sample=True, output_scores=True),
}


@pytest.mark.parametrize("name", CHOSEN_BY_PROCESSORS)
def test_tokens_that_no_graph_chooses(models, steps, name):
    batch, options = inputs([5], [3]), GREEDY | CHOSEN_BY_PROCESSORS[name]
    expected, out = (_generate(model, batch, **options, return_dict_in_generate=True) for model in models)
    assert len(steps) == 1 and torch.equal(out.sequences, expected.sequences)
    for values in ("scores", "logits"):
        assert (getattr(out, values) is None) == (getattr(expected, values) is None)
        for ours, stock in zip(getattr(out, values) or (), getattr(expected, values) or ()):
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)  # -inf of top-k among them


def test_other_calls_stay_with_stock_code(models, steps):
    stock, ours = models
    batch = inputs([5])
    expected = _generate(stock, batch, **GREEDY)
    static = StaticCache(config=ours.config.text_config, max_cache_len=20)
    handle = ours.model.language_model.norm.register_forward_hook(lambda *_: None)
    assert torch.equal(_generate(ours, batch, **GREEDY), expected)
    handle.remove()
    for options in ({CACHE: static}, dict(use_cache=False)):
        assert torch.equal(_generate(ours, batch, **options, **GREEDY), expected)
    assert not steps


def test_returned_cache_goes_on_to_the_next_turn(models, steps):
    """With the whole text, and with the new tokens only."""
    for whole in (True, False):
        results = []
        for model in models:
            out = _generate(model, inputs([3, (1, 4, 6), 4]), return_dict_in_generate=True, **GREEDY)
            turn = torch.cat((out.sequences, torch.tensor([[5, 6, 7]])), 1)
            new = turn if whole else turn[:, out[CACHE].get_seq_length() :]
            again = _generate(
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
        _same_cache(cache, expected_cache)
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
        outs.append(
            _generate(model, turn, **{CACHE: cache}, return_dict_in_generate=True, output_logits=True, **GREEDY)
        )
    assert torch.equal(outs[0].sequences, outs[1].sequences) and not steps
    assert_close(torch.stack(outs[1].logits), torch.stack(outs[0].logits))


def test_keys_and_values_are_there_once(models, monkeypatch):
    """A cache that is not returned is emptied once the step has copied it."""
    seen, begin = [], GpuStep._begin
    monkeypatch.setattr(
        GpuStep,
        "_begin",
        lambda step, pool, cache, *args: (begin(step, pool, cache, *args), seen.append(cache.get_seq_length()))[0],
    )
    _generate(models[1], inputs([5]), **GREEDY)
    kept = _generate(models[1], inputs([5]), return_dict_in_generate=True, **GREEDY)[CACHE]
    assert seen == [0, 5] and kept.get_seq_length() == 4 + GREEDY["max_new_tokens"]


def test_a_model_changed_between_tokens(models, steps):
    """A user's streamer changes the model: stock code continues from there."""
    outs = []
    for model in map(copy.deepcopy, models):
        norm = model.model.language_model.norm
        changed = _Tokens(lambda norm=norm: setattr(norm, "weight", torch.nn.Parameter(-norm.weight)))
        outs.append(_generate(model, inputs([5], [2]), streamer=changed, return_dict_in_generate=True, **GREEDY))
    assert torch.equal(outs[0].sequences, outs[1].sequences) and len(steps) == 1
    _same_cache(outs[1][CACHE], outs[0][CACHE], strides=False)


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
            **first, streamer=_Tokens(lambda: inner.append(ours.generate(**second, **GREEDY))), **GREEDY
        )
        assert torch.equal(out, stock.generate(**first, **GREEDY)) and torch.equal(
            inner[0], stock.generate(**second, **GREEDY)
        )
    assert len({id(step) for step in steps}) == 2 == len(_idle(ours))


def test_two_threads_have_steps_of_their_own(models, steps):
    """Both are in the middle of their tokens at the same time."""
    stock, ours = models
    batches, outs, barrier = [inputs([5]), inputs([8], seed=1)], {}, threading.Barrier(2, timeout=60)

    def work(index):
        outs[index] = ours.generate(**batches[index], streamer=_Tokens(barrier.wait), **GREEDY)

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
            _generate(model, inputs([5]), streamer=_Tokens(stop), **GREEDY, **({CACHE: cache} if kept else {}))
        results.append((cache, _generate(model, inputs([7]), **GREEDY)))
    (expected_cache, expected), (cache, out) = results
    assert torch.equal(out, expected) and len(_idle(ours)) == 1
    if kept:
        _same_cache(cache, expected_cache, strides=False)


def test_steps_serve_again_and_few_are_kept(models, steps):
    stock, ours = models
    for rows in ([[3]], [[20]], [[7], [2]], [[4], [4], [4]], [[40]]):
        batch = inputs(*rows)
        assert torch.equal(_generate(ours, batch, **GREEDY), _generate(stock, batch, **GREEDY))
    assert steps[0] is steps[1] and len({id(step) for step in steps}) == 4  # the last one had to be captured again
    assert [step.rows for step in _idle(ours)] == [4, 1] and len(_idle(ours)) == step_gpu.KEPT_STEPS
    assert all(step._caches.capacity == 0 for step in _idle(ours))  # no keys or values are kept


@pytest.mark.parametrize(
    ("batch", "rows"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (16, 16), (17, 24), (32, 32), (33, 40)]
)
def test_rows_of_a_step(batch, rows):
    assert step_gpu._rows(batch) == rows


def test_memory_follows_the_tokens_and_not_their_limit(models, steps):
    sizes = []

    def stop():
        sizes.append(sum(x.nbytes for x in steps[0]._tensors()))
        raise KeyboardInterrupt

    for limit in (200, 100_000):
        with pytest.raises(KeyboardInterrupt):
            _generate(models[1], inputs([5]), streamer=_Tokens(stop), max_new_tokens=limit, do_sample=True)
    assert sizes[1] <= 1.5 * sizes[0]


def test_capacity_grows_by_half_at_most(models, steps, monkeypatch):
    stock, ours = models
    monkeypatch.setattr(step_gpu, "FIRST_ROOM", 8)
    capacities, run = [], GpuStep.run
    monkeypatch.setattr(
        GpuStep, "run", lambda step, tokens: (run(step, tokens), capacities.append(step._caches.capacity))[0]
    )
    options = dict(do_sample=False, max_new_tokens=170, repetition_penalty=1.5)
    batch = inputs([5], [90])
    assert torch.equal(_generate(ours, batch, **options), _generate(stock, batch, **options))
    grown = sorted(set(capacities))
    assert (
        len(grown) > 2
        and all(after <= max(1.5 * before, before + 64) for before, after in zip(grown, grown[1:]))
        and grown[-1] < 90 + 170 + 64
    )


def _failing(monkeypatch, error, name="captured"):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(graphs.Device, name, fail)


def _begun(model, length=5, release=False):
    """(arguments of ``begin``, a copy of the cache) after a prompt."""
    cache = step_gpu.DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**inputs([length]), **{CACHE: cache})
    positions = torch.full((3, 1, 1), length)
    return dict(
        model=model, cache=cache, positions=positions, mask=None, limit=length + 300, release=release
    ), copy.deepcopy(cache)


@pytest.mark.parametrize("forget", [step_gpu.release, qvl_model.accelerate, qvl_model.restore])
@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no memory"), graphs.CaptureFailed("no graph"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")],
)
@torch.no_grad()
def test_a_failure_is_remembered_for_its_size(models, monkeypatch, error, release, forget):
    ours = models[1]
    arguments, before = _begun(ours, release=release)
    with monkeypatch.context() as patched:
        _failing(patched, error)
        with pytest.raises(StepFailed, match=str(error)):
            GpuStep.begin(**arguments)
    _same_cache(arguments["cache"], before, strides=not release)
    assert str(error) in step_gpu.why_failed(ours, 1, 5) and str(error) in step_gpu.why_failed(ours, 2, 9)
    assert step_gpu.why_failed(ours, 1, 4) is None and step_gpu.why_not(ours) is None
    forget(ours)
    assert step_gpu.why_failed(ours, 1, 5) is None
    qvl_model.accelerate(ours)
    GpuStep.begin(**arguments).end(5)


@pytest.mark.parametrize("by", ["ids", "embeddings"])
def test_a_size_that_failed_is_not_tried_again(models, monkeypatch, by):
    tried, prompt = [], inputs([9])
    monkeypatch.setattr(
        GpuStep, "begin", lambda *args, begin=GpuStep.begin, **kw: tried.append(1) or begin(*args, **kw)
    )
    _failing(monkeypatch, torch.OutOfMemoryError("no memory"))
    if by == "embeddings":
        with torch.no_grad():
            prompt = {"inputs_embeds": models[0].get_input_embeddings()(prompt["input_ids"])}
    with pytest.warns(RuntimeWarning, match="no memory"):
        outs = [_generate(model, prompt, **GREEDY) for model in models]
    outs.append(_generate(models[1], prompt, **GREEDY))
    assert torch.equal(outs[1], outs[0]) and torch.equal(outs[2], outs[0])
    assert len(tried) == 1


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize(
    "error", [RuntimeError("The size of tensor a (3) must match"), TypeError("not callable"), KeyboardInterrupt()]
)
@torch.no_grad()
def test_an_error_that_is_not_of_memory_reaches_the_user(models, monkeypatch, error, release):
    ours = models[1]
    arguments, before = _begun(ours, release=release)
    with monkeypatch.context() as patched, pytest.raises(type(error)) as raised:
        _failing(patched, error)
        GpuStep.begin(**arguments)
    assert raised.value is error and step_gpu.why_failed(ours, 1, 5) is None
    _same_cache(arguments["cache"], before, strides=not release)


@torch.no_grad()
def test_idle_steps_give_their_memory_to_a_new_one(models, monkeypatch):
    ours = models[1]
    for rows in ([[4]], [[4], [4]]):
        _generate(ours, inputs(*rows), **GREEDY)
    captured = graphs.Device.captured

    def fail(*args):
        if _idle(ours):
            raise torch.OutOfMemoryError("no memory")
        return captured(*args)

    monkeypatch.setattr(graphs.Device, "captured", fail)
    batch = inputs([5], [5], [2])
    assert torch.equal(_generate(ours, batch, **GREEDY), _generate(models[0], batch, **GREEDY))
    assert step_gpu.why_failed(ours, 3, 5) is None


def _refuse_growth(monkeypatch) -> None:
    def fail(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(step_gpu.GrowingCaches, "_grow", fail)


@pytest.mark.parametrize("release", [True, False])
@torch.no_grad()
def test_growth_that_fails_gives_all_back(models, monkeypatch, release):
    stock, ours = models
    monkeypatch.setattr(step_gpu, "FIRST_ROOM", 1)
    arguments, _ = _begun(ours, release=release)
    step, tokens = GpuStep.begin(**arguments), torch.randint(1, 150, (70, 1, 1))
    room, run = step._caches.capacity - 5, 0
    _refuse_growth(monkeypatch)
    with pytest.raises(StepFailed, match="no memory"):
        for token in tokens:
            logits = step.run(token).clone()
            run += 1
    assert run == room and step.length == 5 + room
    step.end(step.length)
    expected = step_gpu.DynamicCache(config=stock.config.text_config)
    ids = torch.cat((inputs([5])["input_ids"], tokens[:room].reshape(1, -1)), 1)
    out = stock(input_ids=ids, **{CACHE: expected}).logits[:, -1]
    assert_close(logits, out, 1e-4)
    for layer, other in zip(arguments["cache"].layers, expected.layers):
        assert_close(layer.keys, other.keys, 1e-4)
        assert_close(layer.values, other.values, 1e-4)
    assert not _idle(ours) and "no memory" in step_gpu.why_failed(ours, 1, 5 + room)


@torch.no_grad()
def test_a_full_memory_at_the_end_costs_no_keys(models, monkeypatch):
    arguments, before = _begun(models[1])
    step = GpuStep.begin(**arguments)
    monkeypatch.setattr(
        type(step._caches), "give", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
    )
    step.end(5)
    for layer, expected in zip(arguments["cache"].layers, before.layers):
        assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)
    assert not _idle(models[1])


def _refused(monkeypatch, at="captured"):
    """Makes memory for a step run out."""

    def fail(*args):
        raise torch.OutOfMemoryError("no memory for a graph")

    monkeypatch.setattr(graphs.Device, at, fail)


def test_generation_goes_on_where_a_step_cannot_begin(models, monkeypatch):
    """Generation continues after the prompt: each token is cached, drawn and streamed once; one warning."""
    outs = []
    _refused(monkeypatch)
    for model in models:
        streamer = _Tokens()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                out = _generate(
                    model,
                    inputs([3, (1, 4, 6), 4]),
                    streamer=streamer,
                    do_sample=True,
                    temperature=2.0,
                    max_new_tokens=8,
                    return_dict_in_generate=True,
                )
        outs.append((out, streamer, [str(each.message) for each in caught if "CUDA graphs" in str(each.message)]))
    (expected, expected_streamer, none), (out, streamer, said) = outs
    assert (
        torch.equal(out.sequences, expected.sequences)
        and streamer.values == expected_streamer.values
        and streamer.ended == 2
    )
    _same_cache(out[CACHE], expected[CACHE], strides=False)
    assert not none and len(said) == 1 and "goes on without CUDA graphs: no memory for a graph" in said[0]


def test_what_could_not_begin_keeps_no_memory(models, steps, monkeypatch):
    """The slower path needs that memory."""
    held, alive, call = [], [], type(models[1].model).__call__

    def looked(model, *args, **kwargs):
        held.extend(map(weakref.ref, steps))
        steps.clear()
        alive.append(len(_alive(held)))
        return call(model, *args, **kwargs)

    looked.__module__ = "transformers"  # a user's method is called by stock code
    monkeypatch.setattr(type(models[1].model), "__call__", looked)
    _refused(monkeypatch)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        _generate(models[1], inputs([5]), **GREEDY)
    assert held and alive == [0] * GREEDY["max_new_tokens"]


@pytest.mark.parametrize(
    "options", [GREEDY, GREEDY | ENDS, dict(do_sample=True, max_new_tokens=30, temperature=2.0) | ENDS], ids=str
)
def test_generation_goes_on_where_a_step_cannot_grow(models, monkeypatch, options):
    """Also where tokens were streamed, or chosen before the check whether all rows have ended."""
    monkeypatch.setattr(step_gpu, "FIRST_ROOM", 1)
    monkeypatch.setattr(graphs.Device, "look_every", 8)
    _refuse_growth(monkeypatch)
    for returned in (True, False):
        expected, out = (
            _generate(model, inputs([60], [9]), return_dict_in_generate=returned, **options) for model in models
        )
        assert torch.equal(out.sequences if returned else out, expected.sequences if returned else expected)
        if returned:
            assert_close(out[CACHE].layers[1].keys, expected[CACHE].layers[1].keys, 1e-4)
    step_gpu.release(models[1])


def _alive(references) -> list:
    gc.collect()
    return [x for reference in references if (x := reference()) is not None]


def test_release_frees_steps_and_old_weights(models):
    stock, ours = pair("odd")
    _generate(ours, inputs([5]), **GREEDY)
    step = _idle(ours)[0]
    weight = ours.model.language_model.layers[0].mlp.down_proj.weight
    held = [weakref.ref(x) for x in (step, step._logits, weight)]
    del step
    step_gpu.release(ours)
    ours.model.language_model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(weight.detach() * 2)
    step_gpu.fused_layer_of(
        ours.model.language_model.layers[0]
    )  # the layer's fused layer, which is released separately
    del weight
    assert not _alive(held) and ours not in step_gpu._pools
    step_gpu.release(ours)  # a second release does nothing


def _adapted(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "given",
    [
        lambda model: model,
        lambda model: model.model,
        lambda model: model.model.language_model,
        lambda model: model.model.visual,
        _adapted,
    ],
    ids=["model", "without head", "text part", "vision part", "adapters"],
)
def test_the_public_release(models, given):
    """Releases steps of the model, of the models that contain a part, and through a wrapper; of no other."""
    ours, other = copy.deepcopy(models[1]), copy.deepcopy(models[1])
    for model in (ours, other):
        _generate(model, inputs([5]), **GREEDY)
    step_gpu._pool(ours).failed(8, 100, "no memory")
    held = [weakref.ref(step) for step in _idle(ours)]
    assert len(_alive(held)) == 1 and step_gpu.why_failed(ours, 8, 100) is not None
    qvl_model.release(given(ours))
    assert not _alive(held) and step_gpu.why_failed(ours, 8, 100) is None and len(_idle(other)) == 1


def test_release_where_nothing_is_kept(models):
    stock, ours = models
    step_gpu.release(ours)
    for model in (stock, ours, stock.model.visual):
        assert qvl_model.release(model) is None
    assert torch.equal(_generate(ours, inputs([5]), **GREEDY), _generate(stock, inputs([5]), **GREEDY))
    for wrong in (ours.lm_head, None, "model"):
        with pytest.raises(TypeError, match="qvl_model takes Qwen3VLForConditionalGeneration, .* got "):
            qvl_model.release(wrong)


@pytest.mark.parametrize(
    "change",
    [
        qvl_model.restore,
        lambda model: qvl_model.restore(model.model.language_model),
        lambda model: qvl_model.accelerate(model, weights="int8"),
        lambda model: model.train(),
    ],
    ids=["restore", "restore of a part", "accelerate", "train"],
)
def test_steps_are_freed_where_they_are_of_no_use(models, change):
    ours = copy.deepcopy(models[1])
    _generate(ours, inputs([5]), **GREEDY)
    held = [weakref.ref(step) for step in _idle(ours)]
    ours.eval()
    assert len(_alive(held)) == 1
    change(ours)
    assert not _alive(held)


def test_a_step_in_use_is_freed_when_its_call_ends(models, steps):
    stock, ours = models
    out = ours.generate(**inputs([5]), streamer=_Tokens(lambda: step_gpu.release(ours)), **GREEDY)
    assert torch.equal(out, stock.generate(**inputs([5]), **GREEDY))
    steps[:] = map(weakref.ref, steps)
    assert not _alive(steps) and ours not in step_gpu._pools


def test_steps_do_not_keep_the_model(models):
    stock, ours = pair("odd")
    _generate(ours, inputs([5]), **GREEDY)
    held = [weakref.ref(ours), weakref.ref(_idle(ours)[0])]
    del ours
    assert not _alive(held)


def test_a_step_of_inference_mode_serves_outside_of_it(models, steps):
    stock, ours = models
    with torch.inference_mode():
        _generate(ours, inputs([6]), do_sample=True, max_new_tokens=5)
    batch, options = inputs([7]), dict(do_sample=True, max_new_tokens=9)
    assert torch.equal(_generate(ours, batch, **options), _generate(stock, batch, **options))
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
        before = _generate(model, inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True)
        begun = len(steps)
        cache = DynamicCache(config=model.config.text_config)
        with monkeypatch.context() as patch:
            patch.setattr(mapping, "_local_mapping", dict(mapping._local_mapping))
            change(model, cache)
            outs.append(
                _generate(
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

    _generate(models[1], inputs([9]), **GREEDY)
    with Halved():
        stock, ours = (
            _generate(model, inputs([9]), **GREEDY, return_dict_in_generate=True, output_logits=True)
            for model in models
        )
    assert torch.equal(ours.sequences, stock.sequences) and len(steps) == 1
    assert_close(torch.stack(ours.logits), torch.stack(stock.logits))


def test_memory_of_the_prompt_is_freed_once_it_is_taken_over(models, monkeypatch):
    held, alive, make, run = [], [], kv_cache._Grown.__init__, GpuStep.run
    monkeypatch.setattr(
        kv_cache._Grown,
        "__init__",
        lambda grown, memory: held.append(weakref.ref(memory.k_cache)) or make(grown, memory),
    )
    monkeypatch.setattr(
        GpuStep, "run", lambda *args: alive.append(sum(memory() is not None for memory in held)) or run(*args)
    )
    _generate(models[1], inputs([20]), **GREEDY)
    assert held and alive == [0] * (GREEDY["max_new_tokens"] - 1)


def test_a_custom_loop_finds_its_cache_whole(models):
    """A ``custom_generate`` that keeps the cache which ``generate`` made."""
    results = []
    for model in models:
        kept = []

        def custom(model, input_ids, logits_processor, stopping_criteria, generation_config, kept=kept, **options):
            kept.append(options[CACHE])
            return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **options)

        out = _generate(model, inputs([9], [4]), **GREEDY, custom_generate=custom)
        results.append((out, kept[0]))
    (expected, expected_cache), (out, cache) = results
    assert torch.equal(out, expected)
    _same_cache(cache, expected_cache, strides=False)
