"""Error of stock and accelerated logits against a float64 truth, on a shallow model of full width."""

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode

from bench import inputs
from bench.families import family_of

__all__ = ["KeepDouble", "errors_against_float64", "relative_error"]


class KeepDouble(TorchFunctionMode):
    """Lets stock code run in float64 throughout: its casts of activations to float32 are left out for float64 tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if function is torch.Tensor.float:
                return args[0]
            if function is torch.Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype")):
                return args[0]
        return function(*args, **kwargs)


def relative_error(values: torch.Tensor, truth: torch.Tensor) -> float:
    """||values - truth|| / ||truth|| in float64."""
    return ((values.double() - truth.double()).norm() / truth.double().norm()).item()


@contextlib.contextmanager
def _shallow(path: str, layers: int, dtype: torch.dtype, accelerated: bool) -> Iterator[torch.nn.Module]:
    """The first ``layers`` layers of the text model and of the vision model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(path)
    family_of(config).shallow(config, layers)
    model = AutoModelForImageTextToText.from_pretrained(path, config=config, dtype=dtype, attn_implementation="sdpa").eval()
    if accelerated:
        import qvl_model

        model = qvl_model.accelerate(model)
    yield model


def errors_against_float64(path: str, layers: int, image_size: int, text_tokens: int) -> dict[str, dict[str, float]]:
    """{"bf16": {"stock": error, "ours": error}, "fp32": ...} of all logits of the image prompt."""
    from qvl_model.processing import load_processor

    prompt = inputs.image_prompt(load_processor(path), inputs.photographs(image_size)[:1], text_tokens)

    def logits(dtype: torch.dtype, accelerated: bool) -> torch.Tensor:
        with _shallow(path, layers, dtype, accelerated) as model, torch.inference_mode():
            return model(**prompt).logits[0]

    with KeepDouble():
        truth = logits(torch.float64, accelerated=False)
    return {
        name: {who: relative_error(logits(dtype, who == "ours"), truth) for who in ("stock", "ours")}
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
