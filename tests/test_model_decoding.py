"""The decoding loop of GPUs, run here without graphs on CPU tensors: same tokens as stock's own loop."""

import warnings
import weakref

import pytest
import torch
from models import inputs, pair
from transformers import GenerationConfig, StaticCache
from transformers.generation import LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation import logits_process as processors
from transformers.generation.streamers import BaseStreamer

import qvl_model
from qvl_model import decoding
from qvl_model.compat import CACHE
from qvl_model.sampling import Sampler

GREEDY = dict(do_sample=False, max_new_tokens=12)


@pytest.fixture(scope="module")
def odd_pair():
    return pair("odd")


@pytest.fixture
def models(odd_pair, monkeypatch):
    monkeypatch.setattr(decoding, "graphs_possible", lambda device: None)
    monkeypatch.setattr(decoding, "SMALLEST_CAPACITY", 16)
    monkeypatch.setattr(decoding, "_steps", type(decoding._steps)())
    for model in odd_pair:
        model.model.rope_deltas = None
    return odd_pair


@pytest.fixture
def calls(monkeypatch):
    """The calls that reached our loop."""
    made, original = [], decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *args, **kwargs: made.append(1) or original(*args, **kwargs))
    return made


def _generate(model, batch, **options):
    torch.manual_seed(3)
    return model.generate(**batch, **options)


ROWS = {
    "text": [[9]],
    "one token": [[1]],
    "image": [[3, (1, 4, 6), 4]],
    "ends with an image": [[3, (1, 4, 6)]],
    "video": [[3, (3, 4, 6), 4]],
    "batch 3, left padding": [[9], [1], [7]],
    "batch 3, padding and images": [[3, (1, 4, 6), 5], [4], [2, (1, 2, 2), 3, (1, 8, 4), 1]],
}
OPTIONS = {
    "greedy": GREEDY,
    "one new token": dict(do_sample=False, max_new_tokens=1),
    "repetition penalty": GREEDY | dict(repetition_penalty=1.7),
    "minimum length": GREEDY | dict(min_new_tokens=6, eos_token_id=list(range(0, 160, 2)), pad_token_id=0),
    "top-k of one": dict(do_sample=True, top_k=1, temperature=0.7, top_p=0.9, max_new_tokens=12),
    "ends early": GREEDY | dict(eos_token_id=list(range(0, 160, 7)), pad_token_id=0),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", ROWS)
def test_same_tokens_as_stock(models, calls, rows, options):
    stock, ours = models
    batch = inputs(*ROWS[rows])
    expected = _generate(stock, batch, **OPTIONS[options])
    assert torch.equal(_generate(ours, batch, **OPTIONS[options]), expected)
    assert calls


def test_buffers_serve_again_and_grow(models, calls):
    stock, ours = models
    for length in (3, 20, 7, 40, 5):
        batch = inputs([length], seed=length)
        assert torch.equal(_generate(ours, batch, **GREEDY), _generate(stock, batch, **GREEDY))
    assert len(decoding._steps[ours]) == decoding.KEPT_STEPS and len(calls) == 5


def test_returned_cache_goes_on_to_the_next_turn(models, calls):
    stock, ours = models
    results = []
    for model in models:
        batch = inputs([3, (1, 4, 6), 4])
        out = _generate(model, batch, return_dict_in_generate=True, **GREEDY)
        turn = torch.cat((out.sequences, torch.tensor([[5, 6, 7]])), 1)
        again = model.generate(
            input_ids=turn, attention_mask=torch.ones_like(turn), **{CACHE: out[CACHE]}, do_sample=False, max_new_tokens=6
        )
        results.append((out.sequences, again, out[CACHE].get_seq_length()))
    (expected, expected_again, expected_length), (sequences, again, length) = results
    assert torch.equal(sequences, expected) and torch.equal(again, expected_again) and length == expected_length
    assert len(calls) == 2


def test_weights_changed_later_count(models, calls):
    stock, ours = pair("odd")
    batch = inputs([6])
    _generate(ours, batch, **GREEDY)
    for model in (stock, ours):
        with torch.no_grad():
            model.lm_head.weight.neg_()  # in place: tied to the embeddings
            layer = model.model.language_model.layers[1]
            layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight * 2)
    assert torch.equal(_generate(ours, batch, **GREEDY), _generate(stock, batch, **GREEDY))


class _Tokens(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.reshape(-1).tolist())

    def end(self):
        self.ended += 1


def test_streamer_sees_the_same(models, calls):
    streamers = [_Tokens(), _Tokens()]
    for model, streamer in zip(models, streamers):
        _generate(model, inputs([5]), streamer=streamer, **GREEDY)
    assert streamers[1].values == streamers[0].values and streamers[1].ended == streamers[0].ended == 1
    assert calls


def test_a_failed_capture_warns_once_and_decodes_all_the_same(models, monkeypatch):
    stock, ours = pair("odd")

    def fail(function, device):
        raise torch.OutOfMemoryError("no memory for a graph")

    monkeypatch.setattr(decoding, "_captured", fail)
    batch = inputs([5])
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        out = _generate(ours, batch, **GREEDY)
    assert torch.equal(out, _generate(stock, batch, **GREEDY))
    assert "no memory" in decoding.why_not(ours, batch["input_ids"], [], [], GenerationConfig(), {})
    assert "no memory" in qvl_model.report(ours).decoding


def test_a_failed_capture_keeps_no_memory(models, monkeypatch):
    """Where memory ran out, the slower path needs it."""
    ours, buffers = models[1], []

    def fail(function, device):
        buffers.extend(map(weakref.ref, function.__self__.caches.keys))
        raise torch.OutOfMemoryError("no memory for a graph")

    original = ours.model.language_model.forward
    monkeypatch.setattr(decoding, "_captured", fail)
    monkeypatch.setattr(ours.model.language_model, "forward", lambda *args, **kwargs: alive.append([b() for b in buffers]) or original(*args, **kwargs))
    monkeypatch.setattr(decoding, "_failed", type(decoding._failed)())
    alive = []
    monkeypatch.setattr(decoding, "is_plain", lambda *_: True)  # in spite of the forward that looks
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        _generate(ours, inputs([5]), **GREEDY)
    assert buffers and len(alive) == 1 + GREEDY["max_new_tokens"] and not any(b is not None for seen in alive for b in seen)  # the prompt ran twice


def test_a_failed_capture_starts_again(monkeypatch, models):
    """The cache that the caller keeps holds each token once, and a streamer sees each once."""
    results, streamers = [], [_Tokens(), _Tokens()]
    monkeypatch.setattr(decoding, "_failed", type(decoding._failed)())

    def fail(function, device):
        raise torch.OutOfMemoryError("no memory for a graph")

    monkeypatch.setattr(decoding, "_captured", fail)
    for model, streamer in zip(models, streamers):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(_generate(model, inputs([3, (1, 4, 6), 4]), return_dict_in_generate=True, streamer=streamer, **GREEDY))
    assert models[1] in decoding._failed and torch.equal(results[0].sequences, results[1].sequences)
    for ours, plain in zip(results[1][CACHE].layers, results[0][CACHE].layers):
        torch.testing.assert_close(ours.keys, plain.keys)
    assert streamers[1].values == streamers[0].values and streamers[1].ended == 1


def test_a_failed_capture_draws_the_first_token_once(monkeypatch, models):
    monkeypatch.setattr(decoding, "_failed", type(decoding._failed)())

    def fail(function, device):
        raise torch.OutOfMemoryError("no memory for a graph")

    monkeypatch.setattr(decoding, "_captured", fail)
    streamer = _Tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = _generate(models[1], inputs([5]), streamer=streamer, do_sample=True, max_new_tokens=8, temperature=3.0)
    assert sum(streamer.values, []) == out[0].tolist()


def test_a_step_of_inference_mode_serves_outside_of_it(models, calls):
    stock, ours = models
    with torch.inference_mode():
        _generate(ours, inputs([6]), **GREEDY)
    assert torch.equal(_generate(ours, inputs([7]), **GREEDY), _generate(stock, inputs([7]), **GREEDY))
    assert len(decoding._steps[ours]) == 1 and ours not in decoding._failed


def test_keys_and_values_are_there_once(models, monkeypatch):
    """A cache that nobody asked for is empty once the static one has taken over."""
    seen, original = [], decoding.Step.begin

    def begin(step, cache, *args, **kwargs):
        original(step, cache, *args, **kwargs)
        seen.append(cache.get_seq_length())

    monkeypatch.setattr(decoding.Step, "begin", begin)
    _generate(models[1], inputs([5]), **GREEDY)
    kept = _generate(models[1], inputs([5]), return_dict_in_generate=True, **GREEDY)[CACHE]
    assert seen == [0, 5] and kept.get_seq_length() == 4 + GREEDY["max_new_tokens"]


def test_a_larger_buffer_serves_a_shorter_prompt(models, calls):
    ours = models[1]
    for length, capacities in ((50, [64]), (30, [64]), (2, [64, 16]), (13, [16, 64])):
        _generate(ours, inputs([length]), **GREEDY)
        assert [capacity for _, capacity in decoding._steps[ours]] == capacities


def test_report_says_which_modes_are_captured(models):
    text = qvl_model.report(models[1]).decoding
    assert text.startswith("whole steps as CUDA graphs for greedy and sampling") and "for all else" in text
    assert "own loop" in qvl_model.report(models[1].model).decoding


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(output_scores=True, return_dict_in_generate=True), "scores"),
        (dict(stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(100.0)])), "MaxTimeCriteria"),
        (dict(logits_processor=LogitsProcessorList([processors.NoRepeatNGramLogitsProcessor(2)])), "NoRepeatNGram"),
        (dict(use_cache=False), "cache"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_calls_stay_with_stock_code(models, calls, monkeypatch, options, reason):
    stock, ours = models
    reasons, original = [], decoding.why_not
    monkeypatch.setattr(decoding, "why_not", lambda *args: reasons.append(original(*args)) or reasons[-1])
    batch = inputs([5])
    expected, out = (_generate(model, batch, **GREEDY, **options) for model in (stock, ours))
    if options.get("return_dict_in_generate"):
        expected, out = expected.sequences, out.sequences
    assert torch.equal(out, expected)
    assert not calls and reason in reasons[0]


def test_static_cache_and_hooks_stay_with_stock_code(models, calls):
    stock, ours = models
    batch = inputs([5])
    cache = StaticCache(config=ours.config.text_config, max_cache_len=20)
    _generate(ours, batch, **{CACHE: cache}, **GREEDY)
    handle = ours.model.language_model.norm.register_forward_hook(lambda *_: None)
    _generate(ours, batch, **GREEDY)
    handle.remove()
    assert not calls


def _frequencies(processor_list, logits, draws):
    sampler = Sampler(
        processor_list, StoppingCriteriaList(), do_sample=True, pad=0, rows=draws, vocabulary=logits.shape[0], capacity=4, device=torch.device("cpu")
    )
    sampler.begin(torch.zeros(draws, 3, dtype=torch.long), processor_list)
    tokens = torch.zeros(draws, 1, dtype=torch.long)
    sampler.step(logits.expand(draws, -1).contiguous(), tokens)
    assert torch.equal(sampler.produced[:, :1], tokens) and int(sampler.count) == 1 and int(sampler.length) == 4
    return torch.bincount(tokens[:, 0], minlength=logits.shape[0]) / draws


def test_sampling_draws_from_the_stock_distribution():
    torch.manual_seed(0)
    logits, draws = torch.randn(12) * 2, 40_000
    chain = LogitsProcessorList([
        processors.RepetitionPenaltyLogitsProcessor(1.5), processors.TemperatureLogitsWarper(0.8), processors.TopKLogitsWarper(9),
        processors.TopPLogitsWarper(0.95), processors.MinPLogitsWarper(0.02),
    ])  # fmt: skip
    expected = torch.softmax(chain(torch.zeros(1, 3, dtype=torch.long), logits[None].clone()), -1)[0]
    found = _frequencies(chain, logits, draws)
    assert (found[expected == 0] == 0).all()
    assert (found - expected).abs().max() < 5 * (0.25 / draws) ** 0.5  # five standard deviations at most
