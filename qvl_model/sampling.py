"""Choosing the next token on the device: transformers' own logits processors where their shapes never change, and equal
static-shape forms of those whose input grows. Nothing here waits for the device, so a CUDA graph can hold it."""

import torch
from torch import Tensor
from transformers.generation import logits_process as stock
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

__all__ = ["Sampler", "unsupported_criterion", "unsupported_processor"]

# Pure functions of the scores, with the attributes that say what they do.
_WARPERS = {
    stock.TemperatureLogitsWarper: ("temperature",),
    stock.TopKLogitsWarper: ("top_k", "filter_value"),
    stock.TopPLogitsWarper: ("top_p", "filter_value", "min_tokens_to_keep"),
    stock.MinPLogitsWarper: ("min_p", "filter_value", "min_tokens_to_keep"),
}
_MINIMUM_LENGTHS = {  # class -> the length of the sequence below which no end-of-sequence token may come
    stock.MinNewTokensLengthLogitsProcessor: lambda processor: processor.prompt_length_to_skip + processor.min_new_tokens,
    stock.MinLengthLogitsProcessor: lambda processor: processor.min_length,
}


def unsupported_processor(processor) -> str | None:
    """Why a logits processor cannot run inside a graph, or None."""
    kind = type(processor)
    if kind is stock.RepetitionPenaltyLogitsProcessor:
        return "a repetition penalty at chosen positions" if getattr(processor, "logits_indices", None) is not None else None
    return None if kind in _WARPERS or kind in _MINIMUM_LENGTHS else f"the logits processor {kind.__name__}"


def unsupported_criterion(criterion) -> str | None:
    """Why a stopping criterion cannot be checked inside a graph, or None."""
    return None if type(criterion) in (MaxLengthCriteria, EosTokenCriteria) else f"the stopping criterion {type(criterion).__name__}"


class Sampler:
    """One sampling set-up for a number of rows: from logits to the next tokens, in buffers that stay where they are.

    ``key`` of two set-ups is equal exactly if the same captured graph serves both.

    Args:
        processors: a supported ``LogitsProcessorList``. criteria: a supported ``StoppingCriteriaList``.
        do_sample: draw from the distribution instead of taking its maximum.
        pad: token of rows that have ended.
        rows, vocabulary: of the logits. capacity: tokens that ``produced`` can hold.
    """

    def __init__(
        self, processors, criteria: StoppingCriteriaList, *, do_sample: bool, pad: int, rows: int, vocabulary: int, capacity: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._processors, self._do_sample, self._pad = list(processors), do_sample, pad
        ends = [criterion.eos_token_id for criterion in criteria if type(criterion) is EosTokenCriteria]
        self._ends = torch.cat([end.reshape(-1) for end in ends]).to(device) if ends else None
        self._minima = {
            id(processor): processor.eos_token_id.reshape(-1).to(device) for processor in processors if type(processor) in _MINIMUM_LENGTHS
        }
        penalised = any(type(processor) is stock.RepetitionPenaltyLogitsProcessor for processor in processors)
        self.seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device) if penalised else None
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.produced = torch.full((rows, capacity), pad, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # tokens in produced
        self.length = torch.zeros(1, dtype=torch.long, device=device)  # of the sequences, prompt included

    @staticmethod
    def key(processors, criteria: StoppingCriteriaList, *, do_sample: bool, pad: int) -> tuple:
        parts: list = [do_sample, pad]
        for criterion in criteria:
            parts.append(tuple(criterion.eos_token_id.reshape(-1).tolist()) if type(criterion) is EosTokenCriteria else None)
        for processor in processors:
            kind = type(processor)
            if kind in _MINIMUM_LENGTHS:
                values = (_MINIMUM_LENGTHS[kind](processor), *processor.eos_token_id.reshape(-1).tolist())
            else:
                values = tuple(getattr(processor, name) for name in _WARPERS.get(kind, ("penalty",)))
            parts.append((kind, *values))
        return tuple(parts)

    def begin(self, sequences: Tensor, processors) -> None:
        """Starts over from ``sequences`` [B, L], the last token of which was chosen already; rows beyond B have ended.
        ``processors``: those of this call; what they ignore of the prompt (padding) may differ from call to call."""
        batch = sequences.shape[0]
        self.finished.fill_(True)
        last = sequences[:, -1]
        self.finished[:batch] = self._is_end(last) if self._ends is not None else False
        self.produced.fill_(self._pad)
        self.count.zero_()
        self.length.fill_(sequences.shape[1])
        if self.seen is not None:
            ignored = next(getattr(p, "prompt_ignore_length", None) for p in processors if type(p) is stock.RepetitionPenaltyLogitsProcessor)
            ignored = torch.as_tensor(0 if ignored is None else ignored, device=sequences.device).reshape(-1, 1)
            counted = torch.arange(sequences.shape[1], device=sequences.device) >= ignored
            self.seen.zero_()
            self.seen[:batch].scatter_(1, torch.where(counted, sequences, last[:, None]), True)  # the last token counts anyway

    def step(self, logits: Tensor, tokens: Tensor) -> None:
        """Chooses from ``logits`` [rows, V], writes ``tokens`` [rows, 1] and appends to ``produced``."""
        scores = logits.float()
        for processor in self._processors:
            scores = self._process(processor, scores)
        if self._do_sample:  # what torch.multinomial does for one draw, without its checks
            probabilities = torch.softmax(scores, -1)
            chosen = (probabilities / torch.empty_like(probabilities).exponential_(1.0)).argmax(-1)
        else:
            chosen = scores.argmax(-1)
        chosen = chosen.masked_fill(self.finished, self._pad)
        if self._ends is not None:
            self.finished |= self._is_end(chosen)
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        self.produced.scatter_(1, self.count.expand(chosen.shape[0], 1), chosen[:, None])
        tokens.copy_(chosen[:, None])
        self.count += 1
        self.length += 1

    def _is_end(self, tokens: Tensor) -> Tensor:
        """Like torch.isin, which for many ends sorts and waits for the device: a capture would fail."""
        return (tokens[:, None] == self._ends).any(1)

    def _process(self, processor, scores: Tensor) -> Tensor:
        kind = type(processor)
        if kind is stock.RepetitionPenaltyLogitsProcessor:
            penalised = torch.where(scores < 0, scores * processor.penalty, scores / processor.penalty)
            return torch.where(self.seen, penalised, scores)
        if kind in _MINIMUM_LENGTHS:
            ends = self._minima[id(processor)]
            early = self.length < _MINIMUM_LENGTHS[kind](processor)
            return scores.index_copy(1, ends, scores[:, ends].masked_fill(early, -torch.inf))
        return processor(None, scores)
