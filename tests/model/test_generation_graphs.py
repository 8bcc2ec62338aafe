"""Captured steps over a recording fake of CUDA, and every change that invalidates a captured step."""

import contextlib
import copy

import pytest
import torch
from gpu_steps import Recorded, offer, record
from models import inputs, pair
from torch import nn
from transformers.generation.streamers import BaseStreamer

import qvl_kernels
from qvl_kernels import dispatch
from qvl_model.generation import graphs, step_gpu
from qvl_model.generation.step_gpu import DEPENDS_ON, GpuStep

GREEDY = dict(do_sample=False, max_new_tokens=6)
SAMPLING = dict(do_sample=True, temperature=1.5, max_new_tokens=30)
ENDS = dict(eos_token_id=list(range(0, 160, 9)), pad_token_id=0)


@pytest.fixture(scope="module")
def small_pair():
    return pair("small")


@pytest.fixture
def models(small_pair, monkeypatch):
    offer(monkeypatch)
    for model in small_pair:
        model.model.rope_deltas = None
    return small_pair


@pytest.fixture
def cuda(monkeypatch):
    return record(monkeypatch)


def _generate(model, batch, seed=3, **options):
    torch.manual_seed(seed)
    return model.generate(**batch, **options)


def test_a_step_is_captured_on_its_device_and_its_stream(models, cuda):
    """The GPU is not the current one (0)."""
    stock, ours = models
    assert torch.equal(_generate(ours, inputs([5]), **GREEDY), _generate(stock, inputs([5]), **GREEDY))
    run = "run on 1, capture stream 1"
    capture = "capture on 1, capture stream 1, thread_local, {} memory"
    around = ["capture stream 1 waits for caller", run, run, "{}", run, "caller waits for capture stream 1"]
    assert cuda.calls[0] == "new stream on 1"
    assert cuda.calls[1:7] == [call.format(capture.format("own")) for call in around]  # the token
    assert cuda.calls[7:13] == [call.format(capture.format("shared")) for call in around]  # the choice
    assert cuda.calls[13:] == ["replay on 1, caller"] * 10 and cuda.devices == [0]


def test_the_same_tokens_in_the_first_call(models, cuda):
    """The warm-up before a capture draws no random numbers."""
    stock, ours = models
    first, second, expected = (_generate(model, inputs([5], [3]), **SAMPLING) for model in (ours, ours, stock))
    assert torch.equal(first, second) and torch.equal(first, expected)


@pytest.mark.parametrize("seed", range(4))
def test_draws_after_the_end_are_taken_back(models, cuda, seed):
    """The host checks every eight tokens whether all rows have ended."""
    stock, ours = models
    outs = [(_generate(model, inputs([5], [3]), seed, **SAMPLING, **ENDS), torch.rand(2)) for model in (stock, ours)]
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])


def test_long_outputs_are_put_together(models, cuda, monkeypatch):
    monkeypatch.setattr("qvl_model.generation.sampling_gpu.CHUNK", 7)
    for options in (dict(max_new_tokens=23), dict(max_new_tokens=22), dict(max_new_tokens=23, **ENDS)):
        stock, ours = (_generate(model, inputs([4]), do_sample=True, **options) for model in models)
        assert torch.equal(stock, ours)


class _Streamer(BaseStreamer):
    def __init__(self, at):
        self.count, self.at = 0, at

    def put(self, value):
        self.count += 1
        if self.count == 3:
            self.at()

    def end(self):
        pass


def test_another_stream_waits_for_the_last_one(models, cuda):
    """Between calls and within one; memory is not reused before both streams are done with it."""
    stock, ours = models
    expected = _generate(stock, inputs([5]), **GREEDY)
    _generate(ours, inputs([5]), **GREEDY)
    other, third = (type(cuda.streams[0])(cuda, name) for name in ("other", "third"))
    cuda.calls.clear()
    with cuda.stream(other):
        assert torch.equal(_generate(ours, inputs([5]), **GREEDY), expected)
    assert cuda.calls[0] == "other waits for caller" and cuda.calls.count("other waits for caller") == 1
    used, buffers = cuda.calls.count("memory used on other"), step_gpu._pools[ours]._idle[0]._tensors()
    assert used == len(buffers) and cuda.replayed() == ["replay on 1, other"] * 10
    cuda.calls.clear()
    out = _generate(ours, inputs([5]), streamer=_Streamer(lambda: cuda.streams.append(third)), **GREEDY)
    assert torch.equal(out, expected)
    assert cuda.replayed() == ["replay on 1, caller"] + ["replay on 1, third"] * 4  # tokens are chosen without a graph
    assert [call for call in cuda.calls if "waits" in call] == ["caller waits for other", "third waits for caller"]


def test_a_capture_that_fails_is_told_from_an_error_of_the_model(models, cuda, monkeypatch):
    """Failure in a capture after a successful warm-up is the capture's fault; a failing warm-up is the model's."""
    stock, ours = models
    cuda.fails = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(RuntimeWarning, match="goes on without CUDA graphs: operation not permitted"):
        out = _generate(ours, inputs([5]), **GREEDY)
    assert torch.equal(out, _generate(stock, inputs([5]), **GREEDY))
    assert "empty the allocator of 1" in cuda.calls and cuda.devices == [0] and len(cuda.streams) == 1
    assert "not permitted" in step_gpu.why_failed(ours, 1, 5)
    step_gpu.release(ours)
    cuda.fails = None

    def broken(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(step_gpu, "decode_step", broken)
    with pytest.raises(RuntimeError, match="shapes do not match") as raised:
        _generate(ours, inputs([5]), **GREEDY)
    assert type(raised.value) is RuntimeError and step_gpu.why_failed(ours, 1, 5) is None
    assert cuda.calls[-1] == "caller waits for capture stream 1"


def test_a_choice_that_cannot_be_captured_is_made_by_the_processors(models, cuda, monkeypatch):
    stock, ours = models
    _generate(ours, inputs([5]), **GREEDY)
    cuda.fails = RuntimeError("not permitted")
    with pytest.warns(RuntimeWarning, match="chosen without a CUDA graph: not permitted"):
        out = _generate(ours, inputs([5]), **SAMPLING)
    assert torch.equal(out, _generate(stock, inputs([5]), **SAMPLING))
    assert step_gpu.why_failed(ours, 1, 5) is None


def test_models_on_two_gpus(models, cuda, monkeypatch):
    """Each has a capture stream, and its step runs on its device."""
    stock, first = models
    second = copy.deepcopy(first)
    expected = _generate(stock, inputs([5]), **GREEDY)
    devices = {index: Recorded(cuda, torch.device("cuda", index)) for index in (1, 2)}
    for index, model in ((1, first), (2, second), (1, first), (2, second)):
        monkeypatch.setattr(graphs, "of", lambda _, index=index: devices[index])
        cuda.calls.clear()
        assert torch.equal(_generate(model, inputs([5]), **GREEDY), expected)
        assert cuda.replayed() == [f"replay on {index}, caller"] * 10 and cuda.devices == [0]
        captures = [call for call in cuda.calls if call.startswith("capture on")]
        assert all(call.startswith(f"capture on {index}, capture stream {index}, ") for call in captures)
    assert not captures and cuda.made == 2


def test_a_device_has_one_object():
    first, again, other = (graphs.of(torch.device("cuda", index)) for index in (0, 0, 1))
    assert first is again is not other and type(first) is graphs.Cuda and first.look_every == 8
    assert type(graphs.of(torch.device("cpu"))) is graphs.Device


def _norm(model):
    return model.model.language_model.layers[1].post_attention_layernorm


def _attention(model):
    return model.model.language_model.layers[0].self_attn


def _rotary(model):
    return model.model.language_model.rotary_emb


class _OtherNorm(step_gpu.text.Qwen3VLTextRMSNorm):
    pass


def _set(owner, name, change):
    return lambda model, patch: patch.setattr(owner(model), name, change(getattr(owner(model), name)))


def _hook(model, patch):
    handle = _norm(model).register_forward_hook(lambda *_: None)
    patch.callback(handle.remove)


def _strided(model, patch):
    weight = _attention(model).k_proj.weight
    patch.setattr(weight, "data", weight.data.new_zeros(weight.shape[0], 2 * weight.shape[1])[:, : weight.shape[1]])


def _inside(manager):
    return lambda model, patch: patch.enter(manager())


def _matmuls(name, change):
    """Settings of a module that monkeypatch cannot restore."""

    def changed(model, patch):
        settings = torch.backends.cuda.matmul
        patch.callback(setattr, settings, name, getattr(settings, name))
        setattr(settings, name, change(getattr(settings, name)))

    return changed


CHANGES = {  # what changes each entry
    "classes": lambda model, patch: patch.setattr(_norm(model), "__class__", _OtherNorm),
    "replaced forwards": lambda model, patch: patch.setitem(_norm(model).__dict__, "forward", lambda x: x),
    "hooks": _hook,
    "memory": lambda model, patch: patch.setattr(
        _attention(model).q_proj, "weight", nn.Parameter(_attention(model).q_proj.weight.clone())
    ),
    "shapes": _strided,
    "dtypes": lambda model, patch: patch.setattr(_norm(model).weight, "data", _norm(model).weight.data.half()),
    "devices": lambda model, patch: patch.setattr(_norm(model), "weight", nn.Parameter(_norm(model).weight.to("meta"))),
    "norm of embeddings": _set(lambda model: model.get_input_embeddings(), "max_norm", lambda value: 0.5),
    "epsilons": _set(_norm, "variance_epsilon", lambda value: 2 * value),
    "rotary positions": _set(_rotary, "attention_scaling", lambda value: value + 0.5),
    "attention": _set(_attention, "scaling", lambda value: 2 * value),
    "attention implementation": lambda model, patch: patch.setattr(
        _attention(model).config, "_attn_implementation", "eager"
    ),
    "numbers of QVL's config": lambda model, patch: patch.setattr(
        model.model.language_model.config, "image_token_id", 7, raising=False
    ),
    "dropout": _set(_attention, "attention_dropout", lambda value: value + 0.1),
    "autocast": _inside(lambda: torch.autocast("cpu", torch.bfloat16)),
    "backend": _inside(lambda: qvl_kernels.use_backend("reference")),
    "precision of matmuls": _matmuls("fp32_precision", lambda value: "tf32"),
}
ALSO = {  # further changes of an entry
    "rotary sections": ("rotary positions", _set(_rotary, "mrope_section", lambda value: value[::-1])),
    "rotary frequencies": ("memory", _set(_rotary, "inv_freq", lambda value: value * 1.5)),
    "head": (
        "memory",
        lambda model, patch: patch.setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight * 2)),
    ),
    "index in the cache": ("attention", _set(_attention, "layer_idx", lambda value: value + 1)),
    "causal": ("attention", _set(_attention, "is_causal", lambda value: not value)),
    "training": ("dropout", lambda model, patch: patch.setattr(_attention(model), "training", True)),
    "pre-hook": (
        "hooks",
        lambda model, patch: patch.callback(_norm(model).register_forward_pre_hook(lambda *_: None).remove),
    ),
    "precision of bf16 sums": (
        "precision of matmuls",
        _matmuls("allow_bf16_reduced_precision_reduction", lambda value: not value),
    ),
    "precision of fp16 sums": (
        "precision of matmuls",
        _matmuls("allow_fp16_reduced_precision_reduction", lambda value: not value),
    ),
}


class _Patch:
    """monkeypatch and an exit stack in one."""

    def __init__(self, monkeypatch, stack):
        self.setattr, self.setitem, self.enter, self.callback = (
            monkeypatch.setattr,
            monkeypatch.setitem,
            stack.enter_context,
            stack.callback,
        )


@pytest.fixture
def patch(monkeypatch):
    with contextlib.ExitStack() as stack, monkeypatch.context() as patched:
        yield _Patch(patched, stack)


def test_every_entry_has_a_change():
    assert CHANGES.keys() == DEPENDS_ON.keys() and {entry for entry, _ in ALSO.values()} <= DEPENDS_ON.keys()


@pytest.mark.parametrize("name", [*CHANGES, *ALSO])
def test_a_change_is_noticed(models, patch, name):
    """The change is detected in its entry of DEPENDS_ON, and the captured step is not reused."""
    ours = copy.deepcopy(models[1])
    entry, change = ALSO[name] if name in ALSO else (name, CHANGES[name])
    before = step_gpu._state(ours)
    assert before == step_gpu._state(ours)
    pool = step_gpu._pool(ours)
    for rows in (1, 2):
        pool.check_in(GpuStep(ours, rows, before))
    assert pool.check_out(ours, 2) is not None
    change(ours, patch)
    assert step_gpu._state(ours)[entry] != before[entry]
    assert pool.check_out(ours, 1) is None and not pool._idle


VALUES = {  # changes after which captured steps still run
    "weights in place": lambda model: model.lm_head.weight.data.neg_(),
    "a new weight": lambda model: setattr(
        _attention(model).v_proj, "weight", nn.Parameter(_attention(model).v_proj.weight * 3)
    ),
    "a weight's data": lambda model: setattr(_norm(model).weight, "data", _norm(model).weight.data * -2),
    "epsilons": lambda model: [
        setattr(module, "variance_epsilon", 3.0) for module in model.modules() if hasattr(module, "variance_epsilon")
    ],
    "attention scaling": lambda model: setattr(_rotary(model), "attention_scaling", 3.0),
    "frequencies": lambda model: setattr(_rotary(model), "inv_freq", _rotary(model).inv_freq.flip(0)),
    "scale of scores": lambda model: setattr(_attention(model), "scaling", 4.0),
    "a layer less": lambda model: model.model.language_model.layers.__delitem__(1),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_changed_counts(models, name):
    outs = []
    for model in map(copy.deepcopy, models):
        before = _generate(model, inputs([6]), **GREEDY)
        with torch.no_grad():
            VALUES[name](model)
        outs.append(_generate(model, inputs([6]), **GREEDY))
    assert torch.equal(*outs) and not torch.equal(outs[0], before)


REASONS = {
    "several devices": CHANGES["devices"],
    "change with the length": lambda model, patch: patch.setattr(_rotary(model), "rope_type", "dynamic"),
    "hooks": lambda model, patch: patch.callback(_rotary(model).register_forward_hook(lambda *_: None).remove),
    "decoder layer 1 is not eligible for the fast path": _hook,
    "decoder layer 0 is not eligible for the fast path": lambda model, patch: (
        patch.setattr(_attention(model), "training", True),
        patch.setattr(_attention(model), "attention_dropout", 0.1),
    ),
    "autocast": CHANGES["autocast"],
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_against_captured_steps(models, patch, reason):
    ours = copy.deepcopy(models[1])
    assert step_gpu.why_not(ours) is None
    REASONS[reason](ours, patch)
    assert reason in step_gpu.why_not(ours)


def test_only_triton_runs_captured_steps(monkeypatch):
    monkeypatch.setattr(
        step_gpu.gpu_device, "unavailable", lambda device: None if device.index == 1 else f"no Triton on {device}"
    )
    first, second, host = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
    assert step_gpu.why_no_graphs(second) is None and "no Triton on cuda:0" in step_gpu.why_no_graphs(first)
    assert "cpu have no CUDA graphs" in step_gpu.why_no_graphs(host)
    for backend in ("reference", "cpp"):
        with qvl_kernels.use_backend(backend):
            assert f"{backend} is forced" in step_gpu.why_no_graphs(second) and step_gpu.why_no_graphs(host) is not None
    monkeypatch.setattr(dispatch, "_forced", "triton")
    assert step_gpu.why_no_graphs(second) is None
