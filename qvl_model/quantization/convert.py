"""Quantising a model's linear layers to int8 or int4, in place and one by one, and restoring their dense weights."""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from qvl_kernels import quantization
from qvl_kernels.memory import pages
from qvl_model.capacity.weights import is_finite
from qvl_model.modules import linear, lm_head
from qvl_model.quantization import calibration, external, precision, scaling
from qvl_model.quantization.modules import FORMATS, PackedEmbedding, PackedLinear

__all__ = [
    "METHOD",
    "PARTS",
    "base_modules",
    "fold_again",
    "format_name",
    "formats_in",
    "formats_of",
    "is_quantized",
    "is_quantized_checkpoint",
    "method_of",
    "quantize_model",
    "stored_format",
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
DEFAULT_GROUP = 32  # inputs per scale and zero-point of int4
METHOD = "qvl"  # the quant_method in configs of quantised checkpoints
Weights = str | Mapping[str, str | None] | None


def formats_of(weights: Weights) -> dict[str, str | None]:
    """Format by part of the model, and by pattern of layer names; parts whose weights stay dense do not appear.

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
        if part not in PARTS and not precision.is_pattern(part):
            raise ValueError(
                f"accelerate: weights names the part {part!r}; a model has {', '.join(PARTS)}; patterns of layer names "
                f"have a * or a dot"
            )
        if name is not None and name not in FORMATS:
            raise ValueError(
                f"accelerate: weights={name!r} is no format; accepted are None (as stored), {', '.join(FORMATS)}"
            )
    return {part: name for part, name in weights.items() if name is not None or precision.is_pattern(part)}


def formats_in(model: nn.Module) -> dict[str, str]:
    """Format of the quantised linear layers by part of the model."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    return {part_of(model, name): stored_format(module)[0] for name, module in layers}


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


def method_of(path: str | os.PathLike | None) -> str | None:
    """The ``quant_method`` in the config.json of a directory: "qvl", one of ``external.METHODS``, another, or None."""
    return (section_of(path) or {}).get("quant_method")


def is_quantized_checkpoint(path: str | os.PathLike | None) -> bool:
    """Whether ``path`` is a directory with weights quantised by qvl, in any version of the format, or by a tool whose
    format qvl reads (see ``external``).

    Example:
        >>> is_quantized_checkpoint("qwen3-vl-2b-int8")
        True
    """
    return method_of(path) in (METHOD, *external.METHODS)


def part_of(model: nn.Module, name: str) -> str:
    """Which of ``PARTS`` the module of this name in a model belongs to."""
    if name == "lm_head":
        return "lm_head"
    whole = f"{type(model).__name__}.{name}".lower()  # a vision tower alone has no "visual" in its names
    return "vision" if "visual" in name or "vision" in whole.split("model")[0] or "connector" in name else "text"


def quantize_model(
    model: PreTrainedModel,
    formats: Mapping[str, str | None],
    group: int | None = None,
    inputs: "calibration.Inputs | None" = None,
    bits: float | None = None,
) -> None:
    """Quantises every linear layer of the named parts, int4 with zero-points in groups of ``group`` inputs (None: 32),
    and an embedding tied to a quantised head.

    Only modules that the class of the model builds are quantised; adapters, also copies that train in place of a layer,
    stay, and so do attached linear layers, unless a pattern matches them and nothing else. Each dense weight is freed
    before the next layer, so the peak of memory is the quantised plus the remaining dense weights. Pages of weights
    that are mapped from a file are released too. With ``inputs`` of the model, their channels get input scales (see
    ``qvl_model.quantization.scaling``). Some layers that would be int4 by their part are int8, for an average of at
    most ``bits`` (None: ``precision.BUDGET``).
    Raises: ValueError for other groups, patterns without a layer, bits that int4 alone exceeds, layers that are
    quantised in another format, merged adapters, weights that are not finite, and inputs without layers to calibrate;
    the model is then as it was.
    """
    any_group, group = group is None, DEFAULT_GROUP if group is None else group
    if group not in quantization.GROUPS:
        raise ValueError(f"accelerate: group must be {', '.join(map(str, quantization.GROUPS))}, got {group}")
    if not formats:
        if inputs is not None:
            raise ValueError("accelerate: calibration is for quantised weights; give weights too")
        if bits is not None:
            precision.check_budget({}, 0.0, bits)
        return
    int4_bits = precision.int4_bits(group, zero_points=True)
    modules = dict(base_modules(model))
    heads = _named_heads(model, modules, formats)
    modules.update(heads)
    wanted = _wanted(model, modules, formats)
    chosen = [(name, modules[name], asked) for name, asked in wanted.items() if type(modules[name]) in _LINEAR]
    free = {
        name: modules[name].weight.numel()
        for name, asked in wanted.items()
        if asked == "int4" and not precision.by_pattern(formats, name)
    }
    if bits is not None:
        precision.check_budget(free, int4_bits, bits)
    _check_stored(modules, wanted, None if any_group else group, mixed=bits is not None)
    bits = precision.BUDGET if bits is None else bits
    merged = [name for name, module in _wrappers(model) if getattr(module, "merged", False)]
    if chosen and merged:
        raise ValueError(
            f"accelerate: an adapter is merged into {merged[0]}; call unmerge_adapter first, or merge_and_unload to "
            f"keep it in the weights"
        )
    for name, module, _ in chosen:
        _check_finite(name, module.weight)
    lm_head, embedding = modules.get("lm_head"), _tied_embedding(modules)
    layer_formats = {name: (FORMATS[weights], group) for name, _, weights in chosen if name not in heads}
    scales: dict[str, Tensor] = {}
    errors: dict[str, float] | None = None
    if inputs is not None:
        scales, errors = calibration.calibrate(model, modules, layer_formats, inputs)
    raised = precision.mixed(free, int4_bits, bits, errors)
    for name, module, asked in tqdm(chosen, desc="quantising", unit="layer", disable=None):
        weights = "int8" if name in raised else asked
        weight = module.weight.detach()
        quantised = quantization.quantize(
            _multiplied(weight, scales.get(name)),
            FORMATS[weights],
            group,
            zero_points=weights == "int4",
        )
        PackedLinear.convert(module, quantised)
        if module is lm_head and embedding is not None:
            PackedEmbedding.convert(embedding, quantised)
            embedding.weight = module.weight
        pages.release(weight)
        del weight
        pages.return_freed_memory()
    scaling.put(modules, scales)


def fold_again(model: nn.Module) -> None:
    """Folds the input scales of all layers that have no adapter, or no longer."""
    wrapped = {id(_without_adapters(module)) for _, module in _wrappers(model)}
    for record in scaling.records_of(model):
        if record.can_fold(wrapped):
            record.fold()


def _check_stored(modules: Mapping[str, nn.Module], wanted: Mapping[str, str], group: int | None, mixed: bool) -> None:
    """Raises: ValueError unless layers that are quantised already are in the format that is asked for, int4 in groups
    of ``group`` (None: any). Where int8 and int4 are ``mixed``, or both are there, int8 does for int4.
    """
    stored = {name: stored_format(modules[name]) for name in wanted if isinstance(modules[name], PackedLinear)}
    mixed = mixed or any(found == "int4" for found, _ in stored.values())
    for name, (found, of) in stored.items():
        asked = wanted[name]
        same = found == asked and (asked == "int8" or group in (None, of))
        if not same and not (asked == "int4" and found == "int8" and mixed):
            raise ValueError(
                f"accelerate: {name} is quantised as {format_name(found, of)} already, which "
                f"{format_name(asked, group or DEFAULT_GROUP)} cannot be made of; restore the model first, or load it "
                f"again with from_pretrained"
            )


def _wanted(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], formats: Mapping[str, str | None]
) -> dict[str, str]:
    """The format that is asked for each linear layer, dense or quantised, that is not to stay as it is.

    Raises: ValueError for patterns without a layer.
    """
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, PackedLinear) or type(module) in _LINEAR and "weight" in module._parameters
    ]
    for pattern in filter(precision.is_pattern, formats):
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise ValueError(f"accelerate: weights names {pattern!r}, which matches no linear layer of the model")
    wanted = {name: precision.format_of(formats, part_of(model, name), name) for name in linear}
    return {name: asked for name, asked in wanted.items() if asked is not None}


def _named_heads(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], formats: Mapping[str, str | None]
) -> dict[str, nn.Module]:
    """Linear layers that a user attached, for patterns that match no layer of the model's class; no adapters."""
    patterns = [
        pattern
        for pattern in filter(precision.is_pattern, formats)
        if not any(fnmatchcase(name, pattern) for name in modules)
    ]
    adapters = tuple(f"{name}." for name, _ in _wrappers(model))
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in _LINEAR
        and not name.startswith(adapters)
        and any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the modules that adapters put around others."""
    return ((name, module) for name, module in model.named_modules() if _without_adapters(module) is not module)


def _multiplied(weight: Tensor, scales: Tensor | None) -> Tensor:
    """The weight whose columns are multiplied by the input scales, in fp32."""
    return weight if scales is None else weight.float() * scales.to(weight.device)


def stored_format(module: PackedLinear) -> tuple[str, int | None]:
    """(format, group of int4 or None)"""
    quantized = module.quantized
    name = next(name for name, bits in FORMATS.items() if bits == quantized.bits)
    return name, quantized.group if name == "int4" else None


def format_name(name: str, group: int | None) -> str:
    """What ``stored_format`` found, in words."""
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
    sources = scaling.sources_of(model)
    with scaling.unfolded(model):  # norms and rows have their own values again, and fold back if this fails
        for name, module in quantised:
            weight = getattr(source.get(name), "weight", None)
            if (
                not isinstance(weight, Tensor)
                or weight.shape != module.weight.shape
                or not _same(weight, module, rounded=id(module) in sources)
            ):
                raise ValueError(
                    f"restore: {name} was not quantised from the checkpoint at {path} as it is now; unmerge its "
                    f"adapters, or load the model again with from_pretrained"
                )
    for name, module in base_modules(model):
        if id(module) in sources:
            _put_back(source.get(name), module)
    adapted = next(_wrappers(model), None) is not None
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
    scaling.forget(model)


def _same(weight: Tensor, module: PackedLinear | PackedEmbedding, rounded: bool) -> bool:
    """Whether the module was quantised from ``weight``; ``rounded``: its scales were divided and multiplied again."""
    quantized, scales = module.quantized, scaling.scales_of(module)
    multiplied = _multiplied(weight.detach(), None if scales is None else scales.cpu())
    again = quantization.quantize(multiplied, **quantized.options)
    tolerance = 4 * torch.finfo(quantized.scales.dtype).eps if rounded else 0.0
    ours, theirs = again, quantized.apply(torch.Tensor.cpu)
    same_zeros = ours.zeros is None or torch.equal(ours.zeros, theirs.zeros)
    return (
        torch.equal(ours.values, theirs.values)
        and same_zeros
        and torch.allclose(ours.scales.float(), theirs.scales.float(), rtol=tolerance, atol=0)
    )


@torch.no_grad()
def _put_back(source: nn.Module | None, module: nn.Module) -> None:
    """Norm weights and biases that unfolding left a rounding error away from the checkpoint's, exactly as there.
    Others were trained since then, and stay.
    """
    for name, parameter in module._parameters.items():
        original = getattr(source, name, None)
        if isinstance(original, Tensor) and parameter is not None and original.shape == parameter.shape:
            original = original.detach().to(parameter.device)
            if torch.allclose(original, parameter, rtol=4 * torch.finfo(parameter.dtype).eps, atol=0):
                parameter.copy_(original)
