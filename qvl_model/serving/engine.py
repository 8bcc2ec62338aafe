"""One thread that answers requests with one model. Those that wait when it becomes free are answered in one batch."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qvl_model.cli import answers
from qvl_model.cli.errors import CommandError
from qvl_model.cli.models import Loaded

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Busy", "End", "Engine", "Request"]


class Busy(Exception):
    """As many requests wait as may wait."""


@dataclass(frozen=True)
class End:
    """The end of an answer.

    Attributes:
        reason: "stop", "length", "cancelled", "refused" (the request cannot be answered) or "failed".
        message: why, for the last two.
    """

    reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    message: str = ""


@dataclass(eq=False)
class Request:
    """One conversation to be answered.

    Attributes:
        options: of ``generate``, without ``max_new_tokens``; requests with the same ones may share a batch.
        seed: of sampling; a request that has one is answered alone.
        stop: texts before which the answer ends.
        deliver: called in the engine's thread with each piece of text, and last with an ``End``.
    """

    conversation: answers.Conversation
    options: dict[str, Any]
    max_tokens: int
    deliver: Callable[[str | End], None]
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def shares_a_batch_with(self, other: "Request") -> bool:
        return self.seed is None and other.seed is None and self.options == other.options


class Engine:
    """Answers requests in the order in which they came, those with the same options together.

    Args:
        max_waiting: requests that may wait.
        max_rows: of a batch.
    """

    def __init__(self, loaded: Loaded, *, max_waiting: int = 64, max_rows: int = 8) -> None:
        self.loaded, self._max_waiting, self._max_rows = loaded, max_waiting, max_rows
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="qvl-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Raises: Busy if too many wait."""
        with self._changed:
            self._drop_cancelled()
            if len(self._waiting) >= self._max_waiting:
                raise Busy
            self._waiting.append(request)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after the batch in work; requests that wait are cancelled."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            try:
                self._answer(batch)
            except Exception as error:  # the next batch shall be answered all the same
                text = " ".join(str(error).split())[:300]
                for request in batch:
                    request.deliver(End("failed", message=f"{type(error).__name__}: {text}"))

    def _next(self) -> list[Request]:
        """The requests of the next batch; none after the end."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._stopped:
                    return []
                if self._waiting:
                    first = self._waiting.popleft()
                    others = [other for other in self._waiting if first.shares_a_batch_with(other)]
                    for other in others[: self._max_rows - 1]:
                        self._waiting.remove(other)
                    return [first, *others[: self._max_rows - 1]]
                self._changed.wait()

    def _drop_cancelled(self) -> None:
        for request in [request for request in self._waiting if request.cancelled.is_set() or self._stopped]:
            self._waiting.remove(request)
            request.deliver(End("cancelled"))

    def _answer(self, batch: list[Request]) -> None:
        import torch
        from transformers.generation import BaseStreamer, StoppingCriteriaList

        try:
            inputs = answers.inputs_of(self.loaded, [request.conversation for request in batch])
        except CommandError as error:
            if len(batch) > 1:  # one of them
                for request in batch:
                    self._answer([request])
            else:
                batch[0].deliver(End("refused", message=str(error)))
            return
        lengths = inputs["attention_mask"].sum(1).tolist()
        rows = [_Row(self.loaded, request, length) for request, length in zip(batch, lengths, strict=True)]
        if batch[0].seed is not None:
            torch.manual_seed(batch[0].seed)

        class Streamer(BaseStreamer):
            prompt_seen = False

            def put(self, value: "Tensor") -> None:
                if self.prompt_seen:
                    for row, token in zip(rows, value.tolist(), strict=True):
                        row.put(token)
                self.prompt_seen = True

            def end(self) -> None:
                pass

        def ended(input_ids: "Tensor", scores: "Tensor", **_: object) -> "Tensor":
            return torch.tensor([row.ended for row in rows], device=input_ids.device)

        with torch.inference_mode():
            self.loaded.model.generate(
                **inputs.to(self.loaded.model.device),
                **batch[0].options,
                max_new_tokens=max(request.max_tokens for request in batch),
                streamer=Streamer(),
                stopping_criteria=StoppingCriteriaList([ended]),
            )
        for row in rows:
            row.finish("length")


class _Row:
    """The answer to one request of a batch, as its tokens come."""

    def __init__(self, loaded: Loaded, request: Request, prompt_tokens: int) -> None:
        from tokenizers.decoders import DecodeStream

        self._loaded, self._request, self._prompt_tokens = loaded, request, prompt_tokens
        self._decoder, self._tokenizer = DecodeStream(skip_special_tokens=True), loaded.processor.tokenizer
        self._tokens, self._held, self._done = 0, "", False  # held: text that may be the beginning of a stop text

    @property
    def ended(self) -> bool:
        if self._request.cancelled.is_set():
            self.finish("cancelled")
        return self._done

    def put(self, token: int) -> None:
        if self._done:
            return  # padding, while other rows go on
        self._tokens += 1
        self._show(self._decoder.step(self._tokenizer.backend_tokenizer, token) or "")
        if answers.finish_reason(self._loaded, [token]) == "stop":
            self.finish("stop")
        elif self._tokens >= self._request.max_tokens:
            self.finish("length")

    def _show(self, text: str) -> None:
        """Hands on what cannot belong to a stop text."""
        text, stop = self._held + text, self._request.stop
        found = min((at for one in stop if (at := text.find(one)) >= 0), default=None)
        if found is not None:
            self._held = text[:found]
            self.finish("stop")
            return
        kept = max((n for one in stop for n in range(1, len(one)) if text.endswith(one[:n])), default=0)
        self._held = text[len(text) - kept :]
        if shown := text[: len(text) - kept]:
            self._request.deliver(shown)

    def finish(self, reason: str) -> None:
        if self._done:
            return
        self._done = True
        if self._held:
            self._request.deliver(self._held)
        self._request.deliver(End(reason, self._prompt_tokens, self._tokens))
