"""Quantising a model's linear layers to int8 or int4, in place and one by one, and restoring their dense weights."""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qvl_kernels import quantization
from qvl_kernels.memory import pages
from qvl_model.capacity.weights import is_finite
from qvl_model.modules import linear, lm_head
from qvl_model.quantization.modules import FORMATS, PackedEmbedding, PackedLinear

__all__ = [
    "METHOD",
    "PARTS",
    "base_modules",
    "formats_in",
    "formats_of",
    "is_quantized",
    "is_quantized_checkpoint",
    "quantize_model",
    "quantized_elements",
    "part_of",
    "section_of",
    "tied_pairs",
    "dequantize_model",
    "without_weights",
]

PARTS = ("text", "vision", "lm_head")
_LINEAR = (nn.Linear, linear.Linear, lm_head.Linear)  # subclasses of others may compute something else
_INNER = ("original_module", "base_layer")  # attributes of PEFT's wrappers and layers for the wrapped module
METHOD = "qvl"  # the quant_method in configs of quantised checkpoints
Weights = str | Mapping[str, str | None] | None


def formats_of(weights: Weights) -> dict[str, str]:
    """Format by part of the model; parts whose weights stay dense do not appear.

    Raises: ValueError for unknown formats or parts; TypeError for anything but a name or a mapping.
    Example:
        >>> formats_of({"text": "int4", "lm_head": "int8"})
        {'text': 'int4', 'lm_head': 'int8'}
    """
    if weights is None:
        return {}
    if isinstance(weights, str):
        weights = dict.fromkeys(PARTS, weights)
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"accelerate: weights must be None, a format or a mapping from parts to formats, got "
            f"{type(weights).__name__}"
        )
    for part, name in weights.items():
        if part not in PARTS:
            raise ValueError(f"accelerate: weights names the part {part!r}; a model has {', '.join(PARTS)}")
        if name is not None and name not in FORMATS:
            raise ValueError(
                f"accelerate: weights={name!r} is no format; accepted are None (as stored), {', '.join(FORMATS)}"
            )
    return {part: name for part, name in weights.items() if name is not None}


def formats_in(model: nn.Module) -> dict[str, str]:
    """Format of the quantised linear layers by part of the model."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    return {part_of(model, name): _format_of(module)[0] for name, module in layers}


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model that its class builds from its config, on the meta device: without adapters and attached modules."""
    base = _stock_class(model)
    with torch.device("meta"):
        return base(copy.deepcopy(model.config))


def _stock_class(model: nn.Module) -> type[PreTrainedModel]:
    return next(
        cls
        for cls in type(model).__mro__
        if not cls.__module__.startswith("qvl_model.modules") and issubclass(cls, PreTrainedModel)
    )


def base_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """(name without adapters, module) of the modules that the class of the model builds. Adapters around them, and
    modules that a user attached, are left out.
    """
    for name, _ in without_weights(model).named_modules():
        module = model
        for step in filter(None, name.split(".")):
            module = _without_adapters(module._modules.get(step)) if module is not None else None
        if module is not None:
            yield name, module


def _without_adapters(module: nn.Module | None) -> nn.Module | None:
    for name in _INNER:
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return _without_adapters(inner)
    return module


def tied_pairs(model: nn.Module) -> list[tuple[PackedEmbedding, PackedLinear]]:
    """Quantised embeddings and linear layers that share a weight."""
    embeddings, linears = (
        [module for module in model.modules() if isinstance(module, kind)] for kind in (PackedEmbedding, PackedLinear)
    )
    return [
        (embedding, linear)
        for embedding in embeddings
        for linear in linears
        if linear.weight_values is embedding.weight_values
    ]


def quantized_elements(model: nn.Module, *, exclude_embeddings: bool = False) -> int:
    """Number of elements of the quantised weights; tied ones count once, for the first module that has them."""
    quantised = [module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    first = {id(module.weight_values): module for module in reversed(quantised)}
    return sum(
        module.weight.numel()
        for module in first.values()
        if not (exclude_embeddings and isinstance(module, nn.Embedding))
    )


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of the model is quantised."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def section_of(path: str | os.PathLike | None) -> dict | None:
    """The ``quantization_config`` in the config.json of a directory, or None."""
    try:
        section = json.loads((Path(path) / "config.json").read_text())["quantization_config"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return section if isinstance(section, dict) else None


def is_quantized_checkpoint(path: str | os.PathLike | None) -> bool:
    """Whether ``path`` is a directory with weights quantised by qvl, in any version of the format.

    Example:
        >>> is_quantized_checkpoint("qwen3-vl-2b-int8")
        True
    """
    return (section_of(path) or {}).get("quant_method") == METHOD


def part_of(model: nn.Module, name: str) -> str:
    """Which of ``PARTS`` the module of this name in a model belongs to."""
    if name == "lm_head":
        return "lm_head"
    whole = f"{type(model).__name__}.{name}".lower()  # a vision tower alone has no "visual" in its names
    return "vision" if "visual" in name or "vision" in whole.split("model")[0] or "connector" in name else "text"


def quantize_model(model: PreTrainedModel, formats: dict[str, str], group: int = 64) -> None:
    """Quantises every linear layer of the named parts, int4 in groups of ``group`` inputs, and an embedding tied to a
    quantised head.

    Only modules that the class of the model builds are quantised; adapters, also copies that train in place of a layer,
    and attached modules stay. Each dense weight is freed before the next layer, so the peak of memory is the quantised
    plus the remaining dense weights. Pages of weights that are mapped from a file are released too.
    Raises: ValueError for other groups, layers that are quantised in another format, merged adapters and weights that
    are not finite; the model is then as it was.
    """
    if group not in quantization.GROUPS:
        raise ValueError(f"accelerate: group must be {', '.join(map(str, quantization.GROUPS))}, got {group}")
    if not formats:
        return
    modules = dict(base_modules(model))
    chosen = [
        (name, module, formats[part_of(model, name)])
        for name, module in modules.items()
        if type(module) in _LINEAR and "weight" in module._parameters and part_of(model, name) in formats
    ]
    for name, module in modules.items():
        asked = formats.get(part_of(model, name))
        if (
            isinstance(module, PackedLinear)
            and asked is not None
            and _format_of(module) != (asked, group if asked == "int4" else None)
        ):
            raise ValueError(
                f"accelerate: {name} is quantised as {_format_name(*_format_of(module))} already, which "
                f"{_format_name(asked, group)} cannot be made of; restore the model "
                "first, or load it again with from_pretrained"
            )
    merged = [
        name
        for name, module in model.named_modules()
        if _without_adapters(module) is not module and getattr(module, "merged", False)
    ]
    if chosen and merged:
        raise ValueError(
            f"accelerate: an adapter is merged into {merged[0]}; call unmerge_adapter first, or merge_and_unload to "
            f"keep it in the weights"
        )
    for name, module, _ in chosen:
        _check_finite(name, module.weight)
    lm_head, embedding = modules.get("lm_head"), _tied_embedding(modules)
    for _, module, weights in chosen:
        weight = module.weight.detach()
        quantised = quantization.quantize(weight, FORMATS[weights], group)
        PackedLinear.convert(module, quantised)
        if module is lm_head and embedding is not None:
            PackedEmbedding.convert(embedding, quantised)
            embedding.weight = module.weight
        pages.release(weight)
        del weight
        pages.trim()


def _format_of(module: PackedLinear) -> tuple[str, int | None]:
    """(format, group of int4 or None)"""
    quantized = module.quantized
    name = next(name for name, bits in FORMATS.items() if bits == quantized.bits)
    return name, quantized.group if name == "int4" else None


def _format_name(name: str, group: int | None) -> str:
    return f"{name} in groups of {group}" if name == "int4" else name


def _check_finite(name: str, weight: Tensor) -> None:
    if not is_finite(weight.detach()):
        raise ValueError(
            f"accelerate: {name}.weight has NaN or infinite elements, which no quantised format can hold; nothing was "
            f"quantised"
        )
    pages.release(weight)


def _tied_embedding(modules: Mapping[str, nn.Module]) -> nn.Embedding | None:
    """The token embedding that shares its weight with the head."""
    weight = modules["lm_head"]._parameters.get("weight") if "lm_head" in modules else None
    return next((m for m in modules.values() if type(m) is nn.Embedding and m.weight is weight), None)


def dequantize_model(model: PreTrainedModel) -> None:
    """Puts the dense weights of the checkpoint that the model was loaded from back into its quantised layers; under
    adapters they are frozen.

    Raises: ValueError if that checkpoint is not known, not there, or not what was quantised; the model is then as it
    was.
    """
    quantised = [
        (name, module) for name, module in base_modules(model) if isinstance(module, PackedLinear | PackedEmbedding)
    ]
    if not quantised:
        return
    path = Path(model.name_or_path or "")
    if not model.name_or_path or not path.is_dir() or is_quantized_checkpoint(path):
        where = f" ({path} has them quantised)" if model.name_or_path and path.is_dir() else ""
        raise ValueError(
            f"restore: the weights were quantised, and the checkpoint that they came from is not known{where}; load "
            f"the model again with from_pretrained"
        )
    source = dict(
        _stock_class(model)
        .from_pretrained(path, dtype=quantised[0][1].weight.dtype, trust_remote_code=False)
        .named_modules()
    )
    for name, module in quantised:
        weight = getattr(source.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != module.weight.shape or not _same(weight, module):
            raise ValueError(
                f"restore: {name} was not quantised from the checkpoint at {path} as it is now; unmerge its adapters, "
                f"or load the model again with "
                "from_pretrained"
            )
    adapted = any(_without_adapters(module) is not module for module in model.modules())
    frozen = adapted or not any(
        parameter.requires_grad for parameter in model.parameters()
    )  # a frozen model may have its adapters outside
    weights: dict[int, nn.Parameter] = {}  # tied ones are one parameter in the source, and become one here
    for name, module in quantised:
        weight = source[name].weight
        if id(weight) not in weights:
            trained = module.was_trained and not frozen
            weights[id(weight)] = nn.Parameter(weight.detach().to(module.weight.device), requires_grad=trained)
        module.make_dense(weights[id(weight)])


def _same(weight: Tensor, module: PackedLinear | PackedEmbedding) -> bool:
    quantized = module.quantized
    again = quantization.quantize(weight.detach(), **quantized.options)
    return all(torch.equal(ours, theirs.cpu()) for ours, theirs in zip(again.tensors, quantized.tensors))
