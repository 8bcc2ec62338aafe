"""Packing a model's linear layers into int8 or int4, in place and one by one, and back from the checkpoint they came from."""

import ctypes
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qvl_kernels import quant
from qvl_model.modules.packed import FORMATS, PackedEmbedding, PackedLinear

__all__ = ["PARTS", "formats_of", "is_packed", "pack_model", "part_of", "unpack_model"]

PARTS = ("text", "vision", "lm_head")
GROUP = 64  # inputs per int4 scale
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


def part_of(model: nn.Module, name: str) -> str:
    """The part of the model, one of PARTS, to which the module ``name`` belongs."""
    if name == "lm_head":
        return "lm_head"
    whole = f"{type(model).__name__}.{name}".lower()  # a vision tower alone has no "visual" in its names
    return "vision" if "visual" in name or "vision" in whole.split("model")[0] or "connector" in name else "text"


def pack_model(model: PreTrainedModel, formats: dict[str, str]) -> None:
    """Packs every linear layer of the named parts, and an embedding tied to a packed head.

    One layer after the other, each freed before the next: memory peaks at what is packed plus what is not yet.
    Raises: ValueError for weights that are not finite; the model is then as it was.
    """
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
        packed = quant.quantize(weight, FORMATS[weights], GROUP)
        PackedLinear.pack(module, packed)
        if module is head and embedding is not None:
            PackedEmbedding.pack(embedding, packed, weight.dtype)
        _release(weight)
        del weight


def _check_finite(name: str, weight: Tensor) -> None:
    for piece in weight.detach().split(max(1, (1 << 22) // max(1, weight.shape[1]))):
        if not bool(torch.isfinite(piece).all()):
            raise ValueError(f"accelerate: {name}.weight has NaN or infinite elements, which no packed format can hold; nothing was packed")


def _tied_embedding(model: nn.Module, head: nn.Module | None) -> nn.Embedding | None:
    """The token embedding that shares its weight with the head."""
    if head is None or getattr(head, "weight", None) is None:
        return None
    return next((m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is head.weight), None)


def _release(weight: Tensor) -> None:
    """Lets the pages of a weight that was read from a mapped checkpoint leave memory, though the map itself lives on."""
    if weight.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    first = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        # MADV_PAGEOUT: pages of a file are dropped, changed or anonymous ones kept (swap aside). An error changes nothing.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 21)


def unpack_model(model: PreTrainedModel) -> None:
    """Puts the weights of the checkpoint that the model was loaded from back into its packed layers.

    Raises: ValueError if that checkpoint is not known, not there, or not what was packed; the model is then as it was.
    """
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    if not packed:
        return
    path = Path(model.name_or_path or "")
    if not model.name_or_path or not path.is_dir():
        raise ValueError(
            "restore: the weights were packed, and the checkpoint that they came from is not known; load the model again with from_pretrained"
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
    again = quant.quantize(weight.detach(), quantized.bits, quantized.group if quantized.bits == 4 else GROUP)
    return torch.equal(again.values, quantized.values.cpu()) and torch.equal(again.scales, quantized.scales.cpu())
