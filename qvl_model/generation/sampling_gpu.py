"""Choosing the next token on a GPU as one captured graph: transformers' own logits processors where shapes are static,
and static-shape equivalents of those whose input grows. Parameters are in buffers, so that one graph serves every
temperature, length and penalty.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as stock
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from qvl_model.generation.graphs import Captured, Device
from qvl_model.generation.sampling import Chooser

__all__ = ["MODES", "Sampler", "why_not"]

MODES = "greedy and sampling (temperature, top-k, top-p, min-p, repetition penalty, minimum length)"
CHUNK = 256  # tokens of a sequence between two copies out of the buffer that the graph writes to
SMALLEST_TOP = 64  # least number of largest scores in the graph, of which top-k reads the k-th; else a power of two
NEVER = 2**62  # a length that no sequence reaches


class _Temperature:
    def __init__(self, processor: stock.TemperatureLogitsWarper, sampler: "Sampler") -> None:
        self.value, self.inverse = sampler.buffer(torch.float32), sampler.inverse

    @staticmethod
    def structure(processor: stock.TemperatureLogitsWarper) -> tuple:
        return ()

    def load(self, processor: stock.TemperatureLogitsWarper, sequences: Tensor) -> None:
        self.value.fill_(_factor(processor.temperature, self.inverse))

    def apply(self, scores: Tensor, length: Tensor) -> Tensor:
        return scores * self.value if self.inverse else scores / self.value


class _TopK:
    def __init__(self, processor: stock.TopKLogitsWarper, sampler: "Sampler") -> None:
        self.count, self.filter_value = _largest(processor, sampler.vocabulary), processor.filter_value
        self.index, self.vocabulary = sampler.buffer(torch.long, 1), sampler.vocabulary

    @staticmethod
    def structure(processor: stock.TopKLogitsWarper) -> tuple:
        return _largest(processor), processor.filter_value

    def load(self, processor: stock.TopKLogitsWarper, sequences: Tensor) -> None:
        self.index.fill_(min(processor.top_k, self.vocabulary) - 1)

    def apply(self, scores: Tensor, length: Tensor) -> Tensor:
        smallest = torch.topk(scores, self.count)[0].index_select(-1, self.index)
        return scores.masked_fill(scores < smallest, self.filter_value)


def _largest(processor: stock.TopKLogitsWarper, vocabulary: int = NEVER) -> int:
    return min(1 << (max(processor.top_k, SMALLEST_TOP) - 1).bit_length(), vocabulary)


class _StockProcessor:
    """transformers' own code, with its parameter in a buffer: fp64, as Python floats are, for equal rounding."""

    attribute: str

    def __init__(self, processor: stock.LogitsProcessor, sampler: "Sampler") -> None:
        self.value, self.processor = sampler.buffer(torch.float64), copy.copy(processor)
        setattr(self.processor, self.attribute, self.value)

    @staticmethod
    def structure(processor: stock.LogitsProcessor) -> tuple:
        return processor.filter_value, processor.min_tokens_to_keep

    def load(self, processor: stock.LogitsProcessor, sequences: Tensor) -> None:
        self.value.fill_(getattr(processor, self.attribute))

    def apply(self, scores: Tensor, length: Tensor) -> Tensor:
        return self.processor(None, scores)


class _TopP(_StockProcessor):
    attribute = "top_p"


class _MinP(_StockProcessor):
    attribute = "min_p"


class _MinimumLength:
    """Masks end-of-sequence tokens while sequences are shorter than ``minimum``."""

    def __init__(self, processor: stock.LogitsProcessor, sampler: "Sampler") -> None:
        self.minimum, self.ends = sampler.buffer(torch.long), sampler.buffer(torch.bool, sampler.vocabulary)

    @staticmethod
    def structure(processor: stock.LogitsProcessor) -> tuple:
        return ()

    def load(self, processor: stock.LogitsProcessor, sequences: Tensor) -> None:
        self.minimum.fill_(self.length(processor))
        _mark(self.ends, [processor.eos_token_id])

    def apply(self, scores: Tensor, length: Tensor) -> Tensor:
        return torch.where(self.ends & (length < self.minimum), -math.inf, scores)

    @staticmethod
    def length(processor: Any) -> int:
        return processor.min_length


class _MinimumNewTokens(_MinimumLength):
    @staticmethod
    def length(processor: Any) -> int:
        return processor.prompt_length_to_skip + processor.min_new_tokens


class _RepetitionPenalty:
    def __init__(self, processor: stock.RepetitionPenaltyLogitsProcessor, sampler: "Sampler") -> None:
        self.penalty, self.reward, self.inverse = (
            sampler.buffer(torch.float32),
            sampler.buffer(torch.float32),
            sampler.inverse,
        )
        self.vocabulary = sampler.vocabulary
        self.seen = sampler.buffer(
            torch.bool, sampler.batch, sampler.vocabulary + 1
        )  # the last column takes tokens that do not count
        self.ignored = sampler.buffer(torch.long, sampler.batch, 1)  # first positions of a sequence that do not count

    @staticmethod
    def structure(processor: stock.RepetitionPenaltyLogitsProcessor) -> tuple:
        return ()

    def load(self, processor: stock.RepetitionPenaltyLogitsProcessor, sequences: Tensor) -> None:
        self.penalty.fill_(processor.penalty)
        self.reward.fill_(_factor(processor.penalty, self.inverse))
        ignored = getattr(processor, "prompt_ignore_length", None)
        self.ignored.copy_(torch.as_tensor(0 if ignored is None else ignored).reshape(-1, 1).expand(self.ignored.shape))
        counts = torch.arange(sequences.shape[1], device=sequences.device) >= self.ignored
        self.seen.zero_()
        self.seen.scatter_(1, torch.where(counts, sequences.clamp(max=self.vocabulary), self.vocabulary), True)

    def apply(self, scores: Tensor, length: Tensor) -> Tensor:
        lower = scores * self.reward if self.inverse else scores / self.reward
        return torch.where(
            self.seen[:, : self.vocabulary], torch.where(scores < 0, scores * self.penalty, lower), scores
        )

    def add(self, chosen: Tensor, length: Tensor) -> None:
        chosen = chosen[:, None].clamp(max=self.vocabulary)
        self.seen.scatter_(1, torch.where(length >= self.ignored, chosen, self.vocabulary), True)


_FORMS = {
    stock.TemperatureLogitsWarper: _Temperature,
    stock.TopKLogitsWarper: _TopK,
    stock.TopPLogitsWarper: _TopP,
    stock.MinPLogitsWarper: _MinP,
    stock.MinLengthLogitsProcessor: _MinimumLength,
    stock.MinNewTokensLengthLogitsProcessor: _MinimumNewTokens,
    stock.RepetitionPenaltyLogitsProcessor: _RepetitionPenalty,
}


def _factor(divisor: float, inverse: bool) -> float:
    """The number to multiply with (``inverse``) or divide by, rounded as in PyTorch: its GPU kernels divide by a
    tensor, but multiply with the fp32 reciprocal of a Python number.
    """
    return torch.tensor(divisor, dtype=torch.float32, device="cpu").reciprocal().item() if inverse else divisor


def _mark(mask: Tensor, ids: list[Tensor]) -> None:
    """Sets ``mask`` [V] to True at the ids that are in the vocabulary, else to False."""
    host = torch.zeros(mask.shape, dtype=torch.bool, device="cpu")
    host[[index for tensor in ids for index in tensor.reshape(-1).tolist() if 0 <= index < len(host)]] = True
    mask.copy_(host)


def why_not(chooser: Chooser) -> str | None:
    """Why a graph cannot choose what ``chooser`` would, or None."""
    for processor in chooser.processors:
        if type(processor) not in _FORMS:
            return f"the logits processor {type(processor).__name__}"
        if getattr(processor, "logits_indices", None) is not None:
            return "a repetition penalty at chosen positions"
    for criterion in chooser.criteria:
        if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria):
            return f"the stopping criterion {type(criterion).__name__}"
    if not any(type(criterion) is MaxLengthCriteria for criterion in chooser.criteria):
        return "no maximum length"
    config = chooser.config
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return "scores or logits were asked for"
    return None


class Sampler:
    """Chooses as a ``Chooser`` does, without waiting for the device; see there for its methods.

    Args:
        chooser: one that ``why_not`` accepts. Choosers of equal ``key`` can follow each other, each after ``begin``.
        logits: [B, V], a buffer that every choice reads.
        tokens: int64 [B, 1], a buffer that every choice writes the next input tokens to.
        embeddings: size of the embedding; larger ids are not run.
        device: of the buffers.
        pool: see ``Device.captured``.
    """

    def __init__(
        self, chooser: Chooser, logits: Tensor, tokens: Tensor, embeddings: int, device: Device, pool: Any = None
    ) -> None:
        self.batch, self.vocabulary = logits.shape
        self.inverse = logits.is_cuda
        self.tokens, self._logits, self._embeddings, self._device = tokens, logits, embeddings, device
        self._buffers: list[Tensor] = []
        self.leave()
        self._do_sample = bool(chooser.config.do_sample)
        self._forms = [_FORMS[type(processor)](processor, self) for processor in chooser.processors]
        self._penalties = [form for form in self._forms if type(form) is _RepetitionPenalty]
        self._ends = self.buffer(torch.bool, self.vocabulary)  # tokens that end a sequence
        self._pad = self.buffer(torch.long)
        self._finished = self.buffer(torch.bool, self.batch)
        self._produced = self.buffer(torch.long, self.batch, CHUNK)
        self._count = self.buffer(torch.long, 1)  # tokens in produced
        self._length = self.buffer(torch.long, 1)  # of the sequences
        self._invalid = self.buffer(torch.long, 1)  # the first length at which a probability was NaN
        if self._do_sample:
            self._noise = self.buffer(torch.float32, self.batch, self.vocabulary)
            self._noise.fill_(1.0)
        self._captured: Captured = device.captured(self._choose, pool)

    def buffer(self, dtype: torch.dtype, *shape: int) -> Tensor:
        with torch.inference_mode(False):  # serves calls outside of inference mode, too
            self._buffers.append(torch.zeros(shape, dtype=dtype, device=self._logits.device))
        return self._buffers[-1]

    def tensors(self) -> list[Tensor]:
        return self._buffers

    @staticmethod
    def key(chooser: Chooser) -> tuple:
        forms = tuple(
            (type(processor), *_FORMS[type(processor)].structure(processor)) for processor in chooser.processors
        )
        return len(chooser.sequences), bool(chooser.config.do_sample), forms

    def begin(self, chooser: Chooser) -> None:
        """Continues the sequences of ``chooser``, which has chosen a token."""
        self._chooser, sequences = chooser, chooser.sequences
        ends = [criterion.eos_token_id for criterion in chooser.criteria if type(criterion) is EosTokenCriteria]
        self._max_length = min(
            criterion.max_length for criterion in chooser.criteria if type(criterion) is MaxLengthCriteria
        )
        self._begun, self._steps, self._chunks = sequences.shape[1], 0, []
        _mark(self._ends, ends)
        if ends:
            self._pad.copy_(chooser.config._pad_token_tensor)
        self._finished.copy_(chooser.unfinished == 0)
        self._count.zero_()
        self._length.fill_(sequences.shape[1])
        self._invalid.fill_(NEVER)
        for form, processor in zip(self._forms, chooser.processors):
            form.load(processor, sequences)
        self.tokens.copy_(self._run_next(sequences[:, -1:]))
        self._mark_generator()

    def choose(self, logits: Tensor) -> bool:
        """Chooses from the buffer of logits, which ``logits`` must be. True once all sequences are known to have ended,
        which is checked every few tokens.
        """
        with self._device.active():
            if self._do_sample:
                self._noise.exponential_(
                    1.0
                )  # outside of the graph: the same draw of PyTorch's generator as in stock code
            self._captured.replay()
        self._steps += 1
        if self._steps % CHUNK == 0:
            self._chunks.append(self._produced.clone())
            self._count.zero_()
        streamer = self._chooser.streamer
        if streamer is not None:
            streamer.put(self._last().cpu())
        if self._begun + self._steps >= self._max_length:
            return True
        if streamer is None and self._steps % self._device.look_every:
            return False
        ended = bool(self._finished.all())
        if not ended:
            self._check(self._steps)
            self._mark_generator()
        return ended

    def finish(self) -> Tensor:
        """The sequences, without tokens chosen after all had ended; ``chooser`` can continue from them."""
        chosen = torch.cat((*self._chunks, self._produced[:, : self._steps % CHUNK]), 1)
        used = self._used(chosen)
        self._check(used)
        if used < self._steps and self._do_sample:  # takes back the random draws for unused tokens
            self._device.set_generator_state(self._marked[1])
            for _ in range(used - self._marked[0]):
                self._noise.exponential_(1.0)
        chooser = self._chooser
        chooser.sequences, chooser.unfinished = (
            torch.cat((chooser.sequences, chosen[:, :used]), 1),
            (~self._finished).long(),
        )
        self.leave()
        return chooser.sequences

    def leave(self) -> None:
        """Drops references to the call."""
        self._chooser, self._chunks = None, []

    def _last(self) -> Tensor:
        if self._steps % CHUNK == 0:
            return self._chunks[-1][:, -1]
        return self._produced[:, self._steps % CHUNK - 1]

    def _mark_generator(self) -> None:
        if self._do_sample:
            self._marked = self._steps, self._device.generator_state()

    def _used(self, chosen: Tensor) -> int:
        """How many tokens were chosen until every sequence had ended."""
        before, ends = (self._chooser.unfinished == 0)[:, None], self._ends[chosen.clamp(0, self.vocabulary - 1)]
        ended = torch.cat((before, ends), 1).cumsum(1) > 0
        running = int((~ended.all(0)).sum())  # columns after which some sequence continues
        return min(running, self._steps)

    def _check(self, used: int) -> None:
        if self._do_sample and int(self._invalid) < self._begun + used:
            raise RuntimeError(
                "probability tensor contains either `inf`, `nan` or element < 0"
            )  # the message of torch.multinomial

    def _run_next(self, tokens: Tensor) -> Tensor:
        """Ended sequences may be padded with ids outside of the embedding; their results are not used."""
        return tokens.clamp(0, self._embeddings - 1)

    def _choose(self) -> None:
        """The captured function: from the logits to the next tokens."""
        scores, length = self._logits.float(), self._length
        for form in self._forms:
            scores = form.apply(scores, length)
        if self._do_sample:  # as torch.multinomial for one draw; its checks, which wait for the device, come later
            probabilities = torch.softmax(scores, -1)
            chosen = (probabilities / self._noise).argmax(-1)
            invalid = probabilities.gather(1, chosen[:, None]).isnan().any()
            self._invalid.copy_(torch.where(invalid, torch.minimum(self._invalid, length), self._invalid))
        else:
            chosen = scores.argmax(-1)
        ends = self._ends[chosen]
        chosen = torch.where(self._finished, self._pad, chosen)
        self._finished.logical_or_(ends)
        for penalty in self._penalties:
            penalty.add(chosen, length)
        self._produced.scatter_(1, self._count.expand(self.batch, 1), chosen[:, None])
        self.tokens.copy_(self._run_next(chosen[:, None]))
        self._count.add_(1)
        self._length.add_(1)
