"""Timing of ``generate``: the same code for our models and for engines with the same interface.

Imports nothing of this project: other engines run it in their own environments.
"""

import time

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

__all__ = ["timed_generate"]


class _Clock(BaseStreamer):
    """Time of each token. ``generate`` passes the prompt first, which is skipped."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass


def timed_generate(model: PreTrainedModel, prompt: dict, tokens: int) -> dict[str, float | None]:
    """Greedy generation: seconds to the first token and per token after it (None for a single token)."""
    clock = _Clock()
    start = time.perf_counter()
    model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
    first, last = clock.times[0], clock.times[-1]
    return {"first": first - start, "per_token": (last - first) / (tokens - 1) if tokens > 1 else None}
