"""Bits per weight of a quantised model, as it is stored: values, scales and all that belongs to them."""

from typing import NamedTuple

from torch import nn

from qvl_model.quantization.convert import format_name, stored_format
from qvl_model.quantization.modules import PackedEmbedding, PackedLinear

__all__ = ["Row", "average", "rows"]


class Row(NamedTuple):
    """Layers of one kind and format."""

    kind: str  # last part of their names
    format: str
    layers: int
    weights: int
    bits: float  # per weight


def rows(model: nn.Module) -> list[Row]:
    """One row per kind and format of the quantised layers of a model; a tied weight counts once, as the head's."""
    found: dict[tuple[str, str], tuple[int, int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and not isinstance(module, PackedEmbedding):
            name = name.removesuffix(".base_layer").rpartition(".")[2]
            words = format_name(*stored_format(module))
            layers, weights, stored = found.get((name, words), (0, 0, 0))
            size = sum(8 * buffer.numel() * buffer.element_size() for buffer in module.buffers(recurse=False))
            elements = module.out_features * module.in_features
            found[name, words] = layers + 1, weights + elements, stored + size
    return [Row(*key, layers, weights, stored / max(1, weights)) for key, (layers, weights, stored) in found.items()]


def average(table: list[Row]) -> float:
    """Bits per weight over all rows."""
    return sum(row.bits * row.weights for row in table) / max(1, sum(row.weights for row in table))
