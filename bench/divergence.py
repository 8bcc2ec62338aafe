"""How far a quantised model is from the dense one: perplexity, KL divergence and top-1 agreement, with standard errors
that take whole sequences as samples, since neighbouring tokens are not independent.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Divergence", "Estimate", "text_logits", "windows"]

RESAMPLES = 200  # of the bootstrap for the standard error of a percentile
PERCENTILE = 0.99


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error; NaN with fewer than two sequences."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.1g}"


def windows(ids: list[int], length: int) -> list[Tensor]:
    """Token ids [1, length] of consecutive pieces of a text; the last one may be shorter, down to 2 tokens."""
    if length < 2:
        raise ValueError(f"windows: length must be at least 2, got {length}")
    pieces = [ids[begin : begin + length] for begin in range(0, len(ids), length)]
    return [torch.tensor([piece]) for piece in pieces if len(piece) > 1]


@torch.inference_mode()
def text_logits(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    """The logits [T - 1, V] that predict tokens 1 to T - 1 of ids [1, T], in the dtype of the model."""
    return model(input_ids=ids.to(model.device)).logits[0, :-1].cpu()


@dataclass
class Divergence:
    """Sums over sequences; add each sequence once, then read the estimates."""

    tokens: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # summed over a sequence, in nats
    loss_dense: list[float] = field(default_factory=list)
    agree: list[int] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)  # [tokens], fp64

    def add(self, dense: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Logits [T, V] of both models at the places that predict targets [T].

        Raises: ValueError for shapes that do not fit.
        """
        if dense.shape != logits.shape or dense.dim() != 2 or targets.shape != dense.shape[:1] or not len(targets):
            raise ValueError(
                f"Divergence.add takes logits [T, V] of two models and targets [T], got {tuple(dense.shape)}, "
                f"{tuple(logits.shape)} and {tuple(targets.shape)}"
            )
        kl, loss, loss_dense = [], 0.0, 0.0
        for begin in range(0, len(targets), 64):  # fp64 copies of a few rows at a time
            part = slice(begin, begin + 64)
            p, q = dense[part].double().log_softmax(-1), logits[part].double().log_softmax(-1)
            kl.append((p.exp() * (p - q)).nan_to_num(0.0).sum(-1))  # 0 * -inf is 0
            loss -= q.gather(1, targets[part, None]).sum().item()
            loss_dense -= p.gather(1, targets[part, None]).sum().item()
        self.tokens.append(len(targets))
        self.loss.append(loss)
        self.loss_dense.append(loss_dense)
        self.kl.append(torch.cat(kl))
        self.agree.append(int((dense.argmax(-1) == logits.argmax(-1)).sum()))

    def estimates(self) -> dict[str, Estimate]:
        """Perplexities of both models and their ratio, mean and 99th percentile of KL(dense || model) in nats per
        token, and the share of places whose most likely token is the same.
        """
        mean, dense = self._mean(self.loss), self._mean(self.loss_dense)
        change = self._mean([a - b for a, b in zip(self.loss, self.loss_dense)])
        return {
            "perplexity": _exponential(mean),
            "perplexity_dense": _exponential(dense),
            "perplexity_ratio": _exponential(change),
            "kl_mean": self._mean([part.sum().item() for part in self.kl]),
            "kl_p99": self._percentile(),
            "top1_agreement": self._mean(self.agree),
        }

    def _mean(self, sums: Iterable[float]) -> Estimate:
        """Sum over tokens, and its error as a ratio of sums over sequences [Cochran 1977, section 6.3]."""
        total = sum(self.tokens)
        sums = list(sums)
        value = sum(sums) / total
        count = len(sums)
        if count < 2:
            return Estimate(value, math.nan)
        squares = sum((x - value * n) ** 2 for x, n in zip(sums, self.tokens))
        return Estimate(value, math.sqrt(squares * count / (count - 1)) / total)

    def _percentile(self) -> Estimate:
        """The error is the spread over resampled sequences, the same ones in every run."""
        value = torch.cat(self.kl).quantile(PERCENTILE).item()
        count = len(self.kl)
        if count < 2:
            return Estimate(value, math.nan)
        generator = torch.Generator().manual_seed(0)
        again = [
            torch.cat([self.kl[i] for i in torch.randint(count, (count,), generator=generator)]).quantile(PERCENTILE)
            for _ in range(RESAMPLES)
        ]
        return Estimate(value, torch.stack(again).std().item())


def _exponential(estimate: Estimate) -> Estimate:
    value = math.exp(min(estimate.value, 700.0))
    return Estimate(value, value * estimate.error)
