"""The inputs of the benchmark: real photographs and chat prompts, through the checkpoint's own processor."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = ["batch_prompt", "image_prompt", "load", "photographs", "save", "text_prompt"]

TEXT = (
    "Look at this photograph carefully and describe what you can see in it: the main subject, the background, the "
    "colours, "
    "the light, and anything that seems unusual. Say where the picture may have been taken, at what time of the "
    "day, and "
    "what makes you think so. If there are people, buildings or plants, count them and compare their sizes. "
)


def photographs(size: int) -> list:
    """The two photographs that scikit-learn ships, as square PIL images of ``size`` pixels."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return [
        Image.fromarray(load_sample_image(name)).resize((size, size), Image.Resampling.BICUBIC)
        for name in ("china.jpg", "flower.jpg")
    ]


def _text_of_length(count: Callable[[str], int], tokens: int) -> str:
    """The longest beginning of TEXT, repeated as needed, for which ``count`` gives at most ``tokens``."""
    text, low = TEXT, 0
    while count(text) <= tokens:
        text += TEXT
    high = len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(text[:middle]) <= tokens else (low, middle)
    # Token merges can make a longer text one token shorter, so a few longer prefixes are tried for an exact length.
    return next((text[:end] for end in range(low, min(low + 40, len(text))) if count(text[:end]) == tokens), text[:low])


def image_prompt(processor: "ProcessorMixin", images: list, text_tokens: int) -> dict[str, torch.Tensor]:
    """One chat turn with ``images``; ``text_tokens`` tokens are not visual."""

    def chat(text: str) -> str:
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def count(text: str) -> int:  # every image is still one placeholder here
        return len(processor.tokenizer(chat(text))["input_ids"]) - len(images)

    prompt = chat(_text_of_length(count, text_tokens))
    return dict(processor(images=images, text=[prompt], return_tensors="pt"))


def text_prompt(processor: "ProcessorMixin", tokens: int) -> dict[str, torch.Tensor]:
    """A chat turn of ``tokens`` tokens without an image."""

    def chat(text: str) -> str:
        message = {"role": "user", "content": [{"type": "text", "text": text}]}
        return processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    def count(text: str) -> int:
        return len(processor.tokenizer(chat(text))["input_ids"])

    encoded = processor.tokenizer(chat(_text_of_length(count, tokens)), return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def batch_prompt(processor: "ProcessorMixin", rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """``rows`` chat turns without images, of ``tokens`` tokens down to about half of that, padded on the left."""
    prompts = [text_prompt(processor, tokens - row * tokens // (2 * rows)) for row in range(rows)]
    width = max(prompt["input_ids"].shape[1] for prompt in prompts)
    return {
        key: torch.cat([torch.nn.functional.pad(prompt[key], (width - prompt[key].shape[1], 0)) for prompt in prompts])
        for key in ("input_ids", "attention_mask")
    }


# What every implementation of Qwen3-VL takes; our transformers adds mm_token_type_ids, which older ones refuse.
SAVED = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")


def save(prompts: dict[str, dict[str, torch.Tensor]], file: Path) -> None:
    """Writes prompts, each under its name, to a safetensors file."""
    from safetensors.torch import save_file

    save_file(
        {
            f"{name}.{key}": prompt[key].contiguous()
            for name, prompt in prompts.items()
            for key in SAVED
            if key in prompt
        },
        file,
    )


def load(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What ``save`` wrote."""
    from safetensors.torch import load_file

    prompts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(file).items():
        name, _, key = key.partition(".")
        prompts.setdefault(name, {})[key] = tensor
    return prompts
