"""Choosing the next token by transformers' own logits processors and stopping criteria, as stock ``_sample`` does."""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qvl_model.compat import CACHE

__all__ = ["Chooser"]


class Chooser:
    """Chooses tokens from logits, for one call of ``generate``.

    Args:
        sequences: int64 [B, L], the prompt.
        processors, criteria, config: of the call.
        streamer: gets every token, or None.
    Attributes:
        sequences: int64 [B, L + tokens chosen].
        unfinished: int64 [B], 1 for sequences that have not ended.
    """

    def __init__(
        self,
        sequences: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        self.sequences, self.processors, self.criteria, self.config, self.streamer = (
            sequences,
            processors,
            criteria,
            config,
            streamer,
        )
        self._ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._pad = None if config._pad_token_tensor is None else config._pad_token_tensor.to(sequences.device)
        self.unfinished = torch.ones(sequences.shape[0], dtype=torch.long, device=sequences.device)
        wanted = config.return_dict_in_generate
        self._scores = () if wanted and config.output_scores else None
        self._logits = () if wanted and config.output_logits else None

    @property
    def tokens(self) -> Tensor:
        """int64 [B, 1]: the tokens chosen last."""
        return self.sequences[:, -1:]

    def choose(self, logits: Tensor) -> bool:
        """Chooses the next token of every sequence from logits [B, V]. True once all sequences have ended."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.sequences.device)
        scores = self.processors(self.sequences, logits)
        if self._scores is not None:
            self._scores += (scores,)
        if self._logits is not None:
            self._logits += (logits,)
        if self.config.do_sample:
            tokens = torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(scores, dim=-1)
        if self._ends:
            tokens = tokens * self.unfinished + self._pad * (1 - self.unfinished)
        self.sequences = torch.cat([self.sequences, tokens[:, None]], dim=-1)
        self.unfinished = self.unfinished & ~self.criteria(self.sequences, self._scores)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        return bool(self.unfinished.max() == 0)

    def finish(self) -> Tensor:
        """The sequences [B, L]."""
        return self.sequences

    def result(self, sequences: Tensor, cache: Cache) -> GenerateDecoderOnlyOutput | Tensor:
        """The return value of ``generate``."""
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=self._scores, logits=self._logits, **{CACHE: cache}
        )
