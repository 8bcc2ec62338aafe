"""Error of stock and accelerated logits against a reference, on a shallow model of full width: fp64, or for quantised
weights stock with the dequantised weights.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bench import inputs
from bench.families import family_of

__all__ = ["KeepDouble", "cosines_of_quantised", "errors_against_float64", "fake_quantised", "relative_error"]


class KeepDouble(TorchFunctionMode):
    """Lets stock code run in fp64 throughout: fp64 tensors are not cast to fp32."""

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if function is torch.Tensor.float:
                return args[0]
            if function is torch.Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype")):
                return args[0]
        return function(*args, **kwargs)


def relative_error(values: torch.Tensor, golden: torch.Tensor) -> float:
    """||values - golden|| / ||golden|| in fp64."""
    return ((values.double() - golden.double()).norm() / golden.double().norm()).item()


@contextlib.contextmanager
def _shallow(path: str, layers: int, dtype: torch.dtype, accelerated: bool) -> Iterator[nn.Module]:
    """The first ``layers`` layers of the text model and of the vision model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    family_of(config).shallow(config, layers)
    model = AutoModelForImageTextToText.from_pretrained(
        path, config=config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    ).eval()
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
        golden = logits(torch.float64, accelerated=False)
    return {
        name: {who: relative_error(logits(dtype, who == "ours"), golden) for who in ("stock", "ours")}
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }


def fake_quantised(stock: nn.Module, quantised: nn.Module) -> nn.Module:
    """A copy of the stock model with the fake-quantised weights and activations of the quantised one, in the stock
    model's dtype.
    """
    from qvl_kernels.quantization import rounded_activations
    from qvl_model.quantization.modules import PackedEmbedding, PackedLinear

    exact = copy.deepcopy(stock)
    modules = dict(exact.named_modules())
    for name, module in quantised.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            modules[name].weight = nn.Parameter(module.dequantize().to(stock.dtype))
        if isinstance(module, PackedLinear):
            modules[name].register_forward_pre_hook(
                lambda _, args, weight=module.quantized: rounded_activations(args[0], weight).to(args[0].dtype)
            )
    return exact


def cosines_of_quantised(
    path: str, weights: list[str], layers: int, image_size: int, text_tokens: int
) -> dict[str, float]:
    """{format: the least cosine between the outputs of a quantised layer and of stock with fake-quantised weights and
    activations, both in fp32}.

    Layer by layer, since whole models diverge at rounding ties: rows of a quantised embedding are integers times a
    scale, so many of the first layer's activations lie halfway between two integers.
    """
    import qvl_model
    from qvl_model.processing import load_processor

    prompt = inputs.image_prompt(load_processor(path), inputs.photographs(image_size)[:1], text_tokens)
    least = {}
    for name in weights:
        with _shallow(path, layers, torch.float32, accelerated=False) as stock, torch.inference_mode():
            quantised = qvl_model.accelerate(copy.deepcopy(stock), weights=name)
            cosines: list[float] = []

            def compare(layer: nn.Module, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                outputs = (x[0] if isinstance(x, tuple) else x for x in (layer(*args, **kwargs), output))
                cosines.append(torch.cosine_similarity(*(x.double().flatten() for x in outputs), dim=0).item())

            exact = fake_quantised(stock, quantised)
            for name_of, modules in exact.named_modules():
                if isinstance(modules, nn.ModuleList):
                    for module, layer in zip(modules, quantised.get_submodule(name_of)):
                        module.register_forward_hook(functools.partial(compare, layer), with_kwargs=True)
            exact(**prompt, use_cache=False)
            least[name] = min(cosines)
    return least
