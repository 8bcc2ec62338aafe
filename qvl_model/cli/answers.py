"""Answers of a model to conversations: options of sampling, streaming, and why an answer ended."""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qvl_model.cli.errors import CommandError
from qvl_model.cli.models import Loaded

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BatchFeature

__all__ = ["Answer", "Conversation", "add_sampling", "answer", "end_of", "finish_reason", "inputs_of", "sampling_of"]

MAX_NEW_TOKENS = 128


@dataclass
class Conversation:
    """Turns as chat templates take them, and the images of all turns, in order."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list["Image"] = field(default_factory=list)

    @classmethod
    def of(cls, text: str, images: list["Image"], system: str | None = None) -> "Conversation":
        """One question, with its images before it."""
        conversation = cls()
        if system:
            conversation.messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        conversation.ask(text, images)
        return conversation

    def ask(self, text: str, images: list["Image"]) -> None:
        """Adds a turn of the user."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        self.messages.append({"role": "user", "content": content})
        self.images.extend(images)

    def reply(self, text: str) -> None:
        """Adds a turn of the model."""
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})


@dataclass
class Answer:
    """Text of the model, numbers of tokens, seconds, and why it ended: "stop", or "length" at the limit."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds_to_first_token: float
    seconds: float
    finish_reason: str

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None for a single one."""
        rest = self.seconds - self.seconds_to_first_token
        return (self.completion_tokens - 1) / rest if self.completion_tokens > 1 and rest > 0 else None


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how tokens are chosen."""
    default = "default: of the checkpoint"
    parser.add_argument(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument("--temperature", type=float, metavar="T", help=f"0 is --greedy; {default}")
    parser.add_argument("--top-p", type=float, metavar="P", help=f"sample from the likeliest that sum to P; {default}")
    parser.add_argument("--top-k", type=int, metavar="K", help=f"sample from the K likeliest; {default}")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling (default: another one each time)")


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``generate``. Raises: CommandError for values that mean nothing."""
    if arguments.max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    chosen = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if not 0 <= chosen.get("temperature", 1.0) < float("inf"):
        raise CommandError(f"--temperature must be 0 or more, got {chosen['temperature']}")
    if not 0 < chosen.get("top_p", 1.0) <= 1:
        raise CommandError(f"--top-p must be above 0 and at most 1, got {chosen['top_p']}")
    if chosen.get("top_k", 1) < 1:
        raise CommandError(f"--top-k must be at least 1, got {chosen['top_k']}")
    greedy = arguments.greedy or chosen.get("temperature") == 0
    if arguments.greedy and (chosen or arguments.seed is not None):
        raise CommandError("--greedy samples nothing; leave --temperature, --top-p, --top-k and --seed out")
    if greedy:
        chosen = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif chosen or arguments.seed is not None:
        chosen["do_sample"] = True
    if arguments.seed is not None:
        import torch

        torch.manual_seed(arguments.seed)
    return {"max_new_tokens": arguments.max_new_tokens, "num_beams": 1, **chosen}


def inputs_of(loaded: Loaded, conversations: list[Conversation]) -> "BatchFeature":
    """Inputs of the model, one row per conversation, padded on the left.

    Raises: CommandError for a chat template that cannot be used, and for texts and images that the processor refuses.
    """
    from jinja2 import TemplateError

    from qvl_model.checkpoint_files import one_line

    processor = loaded.processor
    try:
        prompts = [
            processor.apply_chat_template(one.messages, tokenize=False, add_generation_prompt=True)
            for one in conversations
        ]
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        # TemplateError includes what transformers' sandbox forbids in templates
        raise CommandError(f"the chat template of {loaded.path} cannot be used: {one_line(error)}") from error
    images = [image for one in conversations for image in one.images]
    padding = {"padding": True, "padding_side": "left"} if len(conversations) > 1 else {}
    try:
        return processor(images=images or None, text=prompts, return_tensors="pt", **padding)
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise CommandError(f"the processor of {loaded.path} refuses the input: {one_line(error)}") from error


def _streamer(tokenizer: Any, show: Callable[[str], None]) -> Any:
    """A streamer that hands text on as it comes, and notes in ``times`` when each token arrived."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: "Tensor") -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    return Streamer()


def answer(
    loaded: Loaded, inputs: "Mapping[str, Tensor]", options: dict[str, Any], show: Callable[[str], None], **more: Any
) -> tuple[Answer, "Tensor"]:
    """The answer to one row of inputs, and the ids of the prompt and of it. ``show`` gets the text as it comes;
    ``more`` are arguments of ``generate``, such as a KV cache.
    """
    import torch

    processor, model = loaded.processor, loaded.model
    streamer = _streamer(processor.tokenizer, show)
    start = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(**inputs, **options, **more, streamer=streamer)
    end = time.perf_counter()
    length = inputs["input_ids"].shape[1]
    new = ids[0, length:]
    return (
        Answer(
            text=processor.tokenizer.decode(new, skip_special_tokens=True),
            prompt_tokens=length,
            completion_tokens=len(new),
            seconds_to_first_token=(streamer.times[0] if streamer.times else end) - start,
            seconds=end - start,
            finish_reason=finish_reason(loaded, new.tolist()),
        ),
        ids,
    )


def finish_reason(loaded: Loaded, tokens: list[int]) -> str:
    """Whether the model ended its answer ("stop") or the limit did ("length")."""
    return "stop" if any(token in _ends(loaded) for token in tokens) else "length"


def end_of(loaded: Loaded, tokens: list[int]) -> int:
    """How many of the new tokens of a row of a batch belong to its answer; padding follows its end."""
    return next((i + 1 for i, token in enumerate(tokens) if token in _ends(loaded)), len(tokens))


def _ends(loaded: Loaded) -> list[int]:
    ends = loaded.model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
