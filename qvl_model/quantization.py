"""Packing a model's linear layers into int8 or int4, in place and one by one, and back from the checkpoint they came from."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qvl_kernels import pages, quant
from qvl_model.modules.packed import FORMATS, PackedEmbedding, PackedLinear

__all__ = [
    "METHOD", "PARTS", "formats_of", "is_packed", "is_packed_checkpoint", "pack_model", "part_of", "section_of", "unpack_model",
]  # fmt: skip

PARTS = ("text", "vision", "lm_head")
METHOD = "qvl"  # the quant_method in configs of packed checkpoints
Weights = str | Mapping[str, str | None] | None


def formats_of(weights: Weights) -> dict[str, str]:
    """Format by part of the model; parts that keep their weights as they are do not appear.

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
        raise TypeError(f"accelerate: weights must be None, a format or a mapping from parts to formats, got {type(weights).__name__}")
    for part, name in weights.items():
        if part not in PARTS:
            raise ValueError(f"accelerate: weights names the part {part!r}; a model has {', '.join(PARTS)}")
        if name is not None and name not in FORMATS:
            raise ValueError(f"accelerate: weights={name!r} is no format; accepted are None (as stored), {', '.join(FORMATS)}")
    return {part: name for part, name in weights.items() if name is not None}


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of the model is packed."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def section_of(path: str | os.PathLike | None) -> dict | None:
    """The ``quantization_config`` in the config.json of a directory, or None."""
    try:
        section = json.loads((Path(path) / "config.json").read_text())["quantization_config"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return section if isinstance(section, dict) else None


def is_packed_checkpoint(path: str | os.PathLike | None) -> bool:
    """Whether ``path`` is a directory whose weights were packed by qvl, in whatever version.

    Example:
        >>> is_packed_checkpoint("qwen3-vl-2b-int8")
        True
    """
    return (section_of(path) or {}).get("quant_method") == METHOD


def part_of(model: nn.Module, name: str) -> str:
    """Which of ``PARTS`` the module of this name in a model belongs to."""
    if name == "lm_head":
        return "lm_head"
    whole = f"{type(model).__name__}.{name}".lower()  # a vision tower alone has no "visual" in its names
    return "vision" if "visual" in name or "vision" in whole.split("model")[0] or "connector" in name else "text"


def pack_model(model: PreTrainedModel, formats: dict[str, str], group: int = 64) -> None:
    """Packs every linear layer of the named parts, int4 in groups of ``group`` inputs, and an embedding tied to a packed head.

    One layer after the other, each freed before the next: memory peaks at what is packed plus what is not yet. Weights that are
    mapped from a file leave memory as well.
    Raises: ValueError for other groups and weights that are not finite; the model is then as it was.
    """
    if group not in quant.GROUPS:
        raise ValueError(f"accelerate: group must be {', '.join(map(str, quant.GROUPS))}, got {group}")
    chosen = [
        (name, module, formats[part_of(model, name)])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, PackedLinear) and part_of(model, name) in formats
    ]
    for name, module, _ in chosen:
        _check_finite(name, module.weight)
    head = getattr(model, "lm_head", None)
    embedding = _tied_embedding(model, head)
    for _, module, weights in chosen:
        weight = module.weight.detach()
        packed = quant.quantize(weight, FORMATS[weights], group)
        PackedLinear.pack(module, packed)
        if module is head and embedding is not None:
            PackedEmbedding.pack(embedding, packed, weight.dtype)
        pages.release(weight)
        del weight
        pages.trim()


def _check_finite(name: str, weight: Tensor) -> None:
    for piece in weight.detach().split(max(1, (1 << 22) // max(1, weight.shape[1]))):
        if not bool(torch.isfinite(piece).all()):
            raise ValueError(f"accelerate: {name}.weight has NaN or infinite elements, which no packed format can hold; nothing was packed")
    pages.release(weight)


def _tied_embedding(model: nn.Module, head: nn.Module | None) -> nn.Embedding | None:
    """The token embedding that shares its weight with the head."""
    if head is None or getattr(head, "weight", None) is None:
        return None
    return next((m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is head.weight), None)


def unpack_model(model: PreTrainedModel) -> None:
    """Puts the weights of the checkpoint that the model was loaded from back into its packed layers.

    Raises: ValueError if that checkpoint is not known, not there, or not what was packed; the model is then as it was.
    """
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    if not packed:
        return
    path = Path(model.name_or_path or "")
    if not model.name_or_path or not path.is_dir() or is_packed_checkpoint(path):
        where = f" ({path} has them packed)" if model.name_or_path and path.is_dir() else ""
        raise ValueError(
            f"restore: the weights were packed, and the checkpoint that they came from is not known{where}; load the model again with from_pretrained"
        )
    base = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("qvl_model.modules") and issubclass(cls, PreTrainedModel))
    dtype = next(parameter.dtype for parameter in model.parameters())
    source = dict(base.from_pretrained(path, dtype=dtype).named_modules())
    for name, module in packed:
        weight = getattr(source.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != (module.weight_values.shape[0], module._inputs) or not _same(weight, module):
            raise ValueError(f"restore: {name} was not packed from the checkpoint at {path}; load the model again with from_pretrained")
    device = packed[0][1].weight_values.device
    for name, module in packed:
        del module.weight_values, module.weight_scales
        if isinstance(module, PackedEmbedding):
            del module.rows_like
        module.__class__ = nn.Linear if isinstance(module, PackedLinear) else nn.Embedding
        module.weight = nn.Parameter(source[name].weight.detach().to(device), requires_grad=True)
    if isinstance(getattr(model, "lm_head", None), nn.Linear) and any(isinstance(module, nn.Embedding) for _, module in packed):
        model.tie_weights()


def _same(weight: Tensor, module: PackedLinear | PackedEmbedding) -> bool:
    quantized = module.quantized
    again = quant.quantize(weight.detach(), quantized.bits, *([quantized.group] if quantized.bits == 4 else []))
    return torch.equal(again.values, quantized.values.cpu()) and torch.equal(again.scales, quantized.scales.cpu())
