"""Memory of the GPU's decode steps, here on CPU tensors: what is kept, grows and is released, and what happens where it
runs out.
"""

import copy
import gc
import warnings
import weakref

import peft
import pytest
import torch
from generation_runs import ENDS, GREEDY, Tokens, generate, same_cache
from gpu_steps import begun, idle, offer
from models import assert_close, inputs, pair

import qvl_model
from qvl_model.compat import CACHE
from qvl_model.generation import graphs, kv_cache, step_gpu
from qvl_model.generation.step_gpu import GpuStep, StepFailed
from qvl_model.modules import fast_path


@pytest.fixture
def models(models, monkeypatch):
    offer(monkeypatch)
    return models


@pytest.fixture
def steps(monkeypatch):
    """Every step that began."""
    return begun(monkeypatch)


def test_keys_and_values_are_there_once(models, monkeypatch):
    """A cache that is not returned is emptied once the step has copied it."""
    seen, begin = [], GpuStep._begin
    monkeypatch.setattr(
        GpuStep,
        "_begin",
        lambda step, pool, cache, *args: (begin(step, pool, cache, *args), seen.append(cache.get_seq_length()))[0],
    )
    generate(models[1], inputs([5]), **GREEDY)
    kept = generate(models[1], inputs([5]), return_dict_in_generate=True, **GREEDY)[CACHE]
    assert seen == [0, 5] and kept.get_seq_length() == 4 + GREEDY["max_new_tokens"]


def test_steps_serve_again_and_few_are_kept(models, steps):
    stock, ours = models
    for rows in ([[3]], [[20]], [[7], [2]], [[4], [4], [4]], [[40]]):
        batch = inputs(*rows)
        assert torch.equal(generate(ours, batch, **GREEDY), generate(stock, batch, **GREEDY))
    assert steps[0] is steps[1] and len({id(step) for step in steps}) == 4  # the last one had to be captured again
    assert [step.rows for step in idle(ours)] == [4, 1] and len(idle(ours)) == step_gpu.KEPT_STEPS
    assert all(step._caches.capacity == 0 for step in idle(ours))  # no keys or values are kept


def test_memory_follows_the_tokens_and_not_their_limit(models, steps):
    sizes = []

    def stop():
        sizes.append(sum(x.nbytes for x in steps[0]._tensors()))
        raise KeyboardInterrupt

    for limit in (200, 100_000):
        with pytest.raises(KeyboardInterrupt):
            generate(models[1], inputs([5]), streamer=Tokens(once=stop), max_new_tokens=limit, do_sample=True)
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
    assert torch.equal(generate(ours, batch, **options), generate(stock, batch, **options))
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
    same_cache(arguments["cache"], before, strides=not release)
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
        outs = [generate(model, prompt, **GREEDY) for model in models]
    outs.append(generate(models[1], prompt, **GREEDY))
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
    same_cache(arguments["cache"], before, strides=not release)


@torch.no_grad()
def test_idle_steps_give_their_memory_to_a_new_one(models, monkeypatch):
    ours = models[1]
    for rows in ([[4]], [[4], [4]]):
        generate(ours, inputs(*rows), **GREEDY)
    captured = graphs.Device.captured

    def fail(*args):
        if idle(ours):
            raise torch.OutOfMemoryError("no memory")
        return captured(*args)

    monkeypatch.setattr(graphs.Device, "captured", fail)
    batch = inputs([5], [5], [2])
    assert torch.equal(generate(ours, batch, **GREEDY), generate(models[0], batch, **GREEDY))
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
    assert not idle(ours) and "no memory" in step_gpu.why_failed(ours, 1, 5 + room)


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
    assert not idle(models[1])


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
        streamer = Tokens()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                out = generate(
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
        and streamer.seen == expected_streamer.seen
        and streamer.ended == 2
    )
    same_cache(out[CACHE], expected[CACHE], strides=False)
    assert not none and len(said) == 1 and "goes on without CUDA graphs: no memory for a graph" in said[0]


def test_what_could_not_begin_keeps_no_memory(models, steps, monkeypatch):
    """The slower path needs that memory."""
    held, alive, call = [], [], type(models[1].model).__call__

    def looked(model, *args, **kwargs):
        held.extend(map(weakref.ref, steps))
        steps.clear()
        alive.append(len(_alive(held)))
        return call(model, *args, **kwargs)

    # A user's method would be called by stock code.
    monkeypatch.setattr(fast_path, "_LIBRARIES", (*fast_path._LIBRARIES, __name__))
    monkeypatch.setattr(type(models[1].model), "__call__", looked)
    _refused(monkeypatch)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        generate(models[1], inputs([5]), **GREEDY)
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
            generate(model, inputs([60], [9]), return_dict_in_generate=returned, **options) for model in models
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
    generate(ours, inputs([5]), **GREEDY)
    step = idle(ours)[0]
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
        generate(model, inputs([5]), **GREEDY)
    step_gpu._pool(ours).failed(8, 100, "no memory")
    held = [weakref.ref(step) for step in idle(ours)]
    assert len(_alive(held)) == 1 and step_gpu.why_failed(ours, 8, 100) is not None
    qvl_model.release(given(ours))
    assert not _alive(held) and step_gpu.why_failed(ours, 8, 100) is None and len(idle(other)) == 1


def test_release_where_nothing_is_kept(models):
    stock, ours = models
    step_gpu.release(ours)
    for model in (stock, ours, stock.model.visual):
        assert qvl_model.release(model) is None
    assert torch.equal(generate(ours, inputs([5]), **GREEDY), generate(stock, inputs([5]), **GREEDY))
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
    generate(ours, inputs([5]), **GREEDY)
    held = [weakref.ref(step) for step in idle(ours)]
    ours.eval()
    assert len(_alive(held)) == 1
    change(ours)
    assert not _alive(held)


def test_a_step_in_use_is_freed_when_its_call_ends(models, steps):
    stock, ours = models
    out = ours.generate(**inputs([5]), streamer=Tokens(once=lambda: step_gpu.release(ours)), **GREEDY)
    assert torch.equal(out, stock.generate(**inputs([5]), **GREEDY))
    steps[:] = map(weakref.ref, steps)
    assert not _alive(steps) and ours not in step_gpu._pools


def test_steps_do_not_keep_the_model(models):
    stock, ours = pair("odd")
    generate(ours, inputs([5]), **GREEDY)
    held = [weakref.ref(ours), weakref.ref(idle(ours)[0])]
    del ours
    assert not _alive(held)


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
    generate(models[1], inputs([20]), **GREEDY)
    assert held and alive == [0] * (GREEDY["max_new_tokens"] - 1)
