"""Sampling as one CUDA graph: exactly the tokens of transformers' processors and draws, for all their parameters."""

import copy

import pytest
import torch
import transformers
from gpu_steps import offer
from models import inputs, pair
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation import logits_process as stock

from qvl_model.generation import graphs, sampling_gpu, step_gpu
from qvl_model.generation.sampling import Chooser
from qvl_model.generation.sampling_gpu import Sampler

VOCABULARY, BATCH, PROMPT = 300, 3, 5


def _chooser(
    processors=(),
    *,
    ends=None,
    pad=0,
    do_sample=True,
    max_length=100,
    batch=BATCH,
    prompt=PROMPT,
    criteria=(),
    **options,
) -> Chooser:
    config = GenerationConfig(do_sample=do_sample, **options)
    config._pad_token_tensor = torch.tensor(pad)
    sequences = torch.randint(0, VOCABULARY, (batch, prompt), generator=torch.Generator().manual_seed(prompt))
    criteria = StoppingCriteriaList(
        [MaxLengthCriteria(max_length), *([] if ends is None else [EosTokenCriteria(ends)]), *criteria]
    )
    return Chooser(sequences, LogitsProcessorList(processors), criteria, config, None)


def _logits(tokens: int, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(tokens, batch, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3


def _sampler(chooser: Chooser) -> Sampler:
    """A sampler for a chooser that has chosen its first token."""
    batch = len(chooser.sequences)
    sampler = Sampler(
        chooser,
        torch.zeros(batch, VOCABULARY),
        torch.zeros(batch, 1, dtype=torch.long),
        VOCABULARY,
        graphs.Device(torch.device("cpu")),
    )
    sampler._choose()  # as before a capture
    return sampler


def _run(choice, logits: torch.Tensor) -> list[torch.Tensor]:
    """The next tokens after each choice, until the end."""
    torch.manual_seed(5)
    tokens, ended = [], False
    for scores in logits:
        if not ended:
            if isinstance(choice, Sampler):
                choice._logits.copy_(scores)
            ended = choice.choose(scores)
            tokens.append(choice.tokens.clone())
    return tokens


def _per_row(processor, *ignored):
    """Processors as newer versions of transformers make them."""
    for lengths in ignored:
        processor.prompt_ignore_length = torch.tensor(lengths)
        yield copy.copy(processor)


CHAINS = {  # processors, each with several values for the same graph
    "temperature": [[stock.TemperatureLogitsWarper(value)] for value in (0.3, 0.7, 1.9)],
    "top-k": [[stock.TopKLogitsWarper(value)] for value in (1, 7, 64)],
    "more top-k": [[stock.TopKLogitsWarper(value)] for value in (65, 128)],
    "more than all": [[stock.TopKLogitsWarper(value)] for value in (290, 300, 500)],
    "top-p": [[stock.TopPLogitsWarper(value)] for value in (0.1, 0.9, 0.95, 1.0)],
    "min-p": [[stock.MinPLogitsWarper(value)] for value in (0.0, 0.02, 0.3)],
    "minimum length": [
        [stock.MinLengthLogitsProcessor(length, torch.tensor(ends))]
        for length, ends in ((9, [*range(0, 300, 2)]), (12, [7, 10**6, 4]))
    ],
    "new tokens": [
        [stock.MinNewTokensLengthLogitsProcessor(5, length, torch.tensor([*range(0, 300, 2)]))] for length in (0, 3, 8)
    ],
    "repetition": [[stock.RepetitionPenaltyLogitsProcessor(value)] for value in (1.1, 3.0, 0.6)],
    "repetition, ignored": [[stock.RepetitionPenaltyLogitsProcessor(3.0, n)] for n in (None, 2, 5, 9)],
    "repetition, ignored per row": [
        [processor] for processor in _per_row(stock.RepetitionPenaltyLogitsProcessor(3.0), [0, 7, 4], [9, 1, 0])
    ],
    "all": [
        [
            stock.MinLengthLogitsProcessor(length, torch.tensor([*range(0, 300, 3)])),
            stock.RepetitionPenaltyLogitsProcessor(penalty, 1),
            stock.RepetitionPenaltyLogitsProcessor(0.9),
            stock.TemperatureLogitsWarper(penalty),
            stock.TopKLogitsWarper(40),
            stock.TopPLogitsWarper(0.9),
            stock.MinPLogitsWarper(0.01),
        ]
        for length, penalty in ((8, 1.3), (11, 1.6))
    ],
}


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", CHAINS)
def test_one_sampler_for_all_numbers(name, do_sample):
    if name.endswith("per row") and transformers.__version__ < "5.20":
        pytest.skip("this version counts them for all rows together")
    logits, keys, sampler = _logits(20), set(), None
    for index, processors in enumerate(CHAINS[name]):
        setting = dict(
            do_sample=do_sample, prompt=PROMPT + index % 3, ends=torch.tensor([*range(index, 300, 40)]), pad=index
        )
        plain, chooser = _chooser(processors, **setting), _chooser(processors, **setting)
        for each in (plain, chooser):
            _run(each, logits[:1])
        keys.add(Sampler.key(chooser))
        sampler = sampler or _sampler(chooser)
        sampler.begin(chooser)
        expected = _run(plain, logits[1:])
        assert torch.equal(torch.stack(_run(sampler, logits[1:])), torch.stack(expected))
        assert torch.equal(sampler.finish(), plain.finish())
    assert len(keys) == 1


def test_what_needs_another_graph():
    different = [
        _chooser(),
        _chooser(do_sample=False),
        _chooser(batch=2),
        *(_chooser(chains[0]) for chains in CHAINS.values()),
        _chooser([stock.TopPLogitsWarper(0.9, filter_value=-5.0)]),
        _chooser([stock.TopPLogitsWarper(0.9, min_tokens_to_keep=2)]),
        _chooser([stock.TopKLogitsWarper(9, filter_value=-5.0)]),
        _chooser([stock.TemperatureLogitsWarper(0.7), stock.TopKLogitsWarper(9)]),
        _chooser([stock.TopKLogitsWarper(9), stock.TemperatureLogitsWarper(0.7)]),
    ]
    keys = [Sampler.key(chooser) for chooser in different]
    repeated = [index for index, key in enumerate(keys) if key in keys[:index]]
    assert [[*CHAINS][index - 3] for index in repeated] == [
        "repetition, ignored",
        "repetition, ignored per row",
    ]  # as "repetition"


@pytest.mark.parametrize("value", [0.3, 0.7, 1.1, 1.9])
def test_a_gpu_divides_by_multiplying(value):
    """PyTorch's CUDA kernels divide by a Python number as a multiplication by its fp32 reciprocal."""
    scores = _logits(1)[0]
    chooser = _chooser([stock.TemperatureLogitsWarper(value), stock.RepetitionPenaltyLogitsProcessor(value)])
    sampler = _sampler(chooser)
    sampler.inverse = True
    temperature, penalty = (
        sampling_gpu._FORMS[type(processor)](processor, sampler) for processor in chooser.processors
    )
    reciprocal = torch.tensor(1.0) / torch.tensor(value)
    for form, processor in zip((temperature, penalty), chooser.processors):
        form.load(processor, chooser.sequences)
    assert torch.equal(temperature.apply(scores, sampler._length), scores * reciprocal)
    seen = torch.zeros(BATCH, VOCABULARY, dtype=torch.bool).scatter(1, chooser.sequences, True)
    expected = torch.where(seen, torch.where(scores < 0, scores * value, scores * reciprocal), scores)
    assert torch.equal(penalty.apply(scores, sampler._length), expected)


def test_a_padding_that_is_no_token_is_not_run():
    logits = _logits(12)
    for pad in (-1, 10**6):
        chooser, plain = (_chooser(ends=torch.tensor([*range(0, 300, 2)]), pad=pad) for _ in range(2))
        for each in (chooser, plain):
            _run(each, logits[:1])
        sampler = _sampler(chooser)
        sampler.begin(chooser)
        tokens = _run(sampler, logits[1:])
        _run(plain, logits[1:])
        assert torch.equal(sampler.finish(), plain.finish()) and (plain.finish() == pad).any()
        assert all(((0 <= each) & (each < VOCABULARY)).all() for each in tokens)


def test_a_probability_that_is_no_number_is_said():
    """The error is torch.multinomial's; probabilities after the end are ignored."""
    logits, ends = _logits(12), torch.tensor([*range(0, 300, 2)])
    for row, first in ((0, 2), (2, 4)):
        broken = logits.clone()
        broken[first:, row] = torch.nan
        chooser, plain = _chooser(), _chooser()
        with pytest.raises(RuntimeError) as expected:
            _run(plain, broken)
        _run(chooser, broken[:1])
        sampler = _sampler(chooser)
        sampler.begin(chooser)
        with pytest.raises(RuntimeError) as raised:
            _run(sampler, broken[1:])
        assert str(raised.value) == str(expected.value)
    for limit, message in ((100, None), (7, "nan")):
        chooser = _chooser(ends=ends, max_length=limit)
        _run(chooser, logits[:1])
        sampler = _sampler(chooser)
        sampler._device.look_every = 8
        sampler.begin(chooser)
        broken = logits[1:].clone()
        broken[5 if message is None else 0 :] = torch.nan
        sampled = _run(sampler, broken)
        if message is None:
            assert len(sampled) == 8 and sampler.finish().shape[1] < PROMPT + 1 + 5
        else:
            with pytest.raises(RuntimeError, match=message):
                sampler.finish()


class _Warmer(stock.TemperatureLogitsWarper):
    """A user's logits processor, which may do anything."""


def _at_positions():
    processor = stock.RepetitionPenaltyLogitsProcessor(1.5)
    processor.logits_indices = torch.tensor([0])
    return processor


REASONS = {
    "processor NoRepeatNGram": dict(processors=[stock.NoRepeatNGramLogitsProcessor(2)]),
    "processor _Warmer": dict(processors=[_Warmer(0.5)]),
    "chosen positions": dict(processors=[_at_positions()]),
    "criterion MaxTimeCriteria": dict(criteria=[MaxTimeCriteria(100.0)]),
    "scores": dict(return_dict_in_generate=True, output_scores=True),
    "logits": dict(return_dict_in_generate=True, output_logits=True),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_no_graph_chooses(reason):
    assert sampling_gpu.why_not(_chooser()) is None and reason in sampling_gpu.why_not(_chooser(**REASONS[reason]))
    without = _chooser()
    del without.criteria[0]
    assert "no maximum length" in sampling_gpu.why_not(without)


def test_few_samplers_are_kept(monkeypatch):
    """The number of kept samplers is bounded; parameter values need no new sampler."""
    offer(monkeypatch)
    made, original = [], Sampler.__init__
    monkeypatch.setattr(Sampler, "__init__", lambda *args: made.append(1) or original(*args))
    stock_model, ours = pair("one_layer")
    settings = [
        dict(temperature=value, top_k=count, repetition_penalty=penalty)
        for value, count, penalty in ((0.7, 20, 1.2), (1.4, 50, 1.1))
    ]
    settings += [dict(top_k=0, min_p=0.1), dict(top_k=100), dict(top_p=0.9), dict(top_k=0), settings[0]]
    counts = []
    for index, options in enumerate(settings):
        outs = []
        for model in (stock_model, ours):
            torch.manual_seed(index)
            outs.append(model.generate(**inputs([3 + index]), do_sample=True, max_new_tokens=5, **options))
        assert torch.equal(*outs)
        counts.append(len(made))
    step = step_gpu._pools[ours]._idle[0]
    assert counts == [1, 1, 2, 3, 4, 5, 6] and len(step._samplers) == step_gpu.KEPT_SAMPLERS == 4


def test_another_default_device():
    mask = torch.zeros(9, dtype=torch.bool)
    with torch.device("meta"):
        assert sampling_gpu._factor(0.7, inverse=True) == (torch.ones((), device="cpu") / 0.7).item()
        sampling_gpu._mark(mask, [torch.tensor([2, 5, 9], device="cpu")])
    assert mask.nonzero()[:, 0].tolist() == [2, 5]
