"""Keys and values of images in a KV cache of transformers: written once, kept through generation.

A ``VisualLayer`` comes after the text layers of any ``Cache`` (dynamic or static), so that copying, beam reordering,
repeating and selecting of batches treat it as any other layer. It neither grows nor is cropped.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["VisualLayer", "add_visual_layer", "holds_images", "visual_layer"]


class VisualLayer(CacheLayerMixin):
    """One cross-attention layer's keys and values [B, Hkv, S, D], and how many of the S each sample has (None: all)."""

    is_sliding = False
    is_compileable = True  # its size does not change from step to step
    is_croppable = True  # crop leaves images alone

    def __init__(self) -> None:
        super().__init__()
        self.lengths: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values, self.lengths = key_states, value_states, lengths
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return 0 if self.keys is None else self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return 0  # of text

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.keys = self.values = self.lengths = None
        self.is_initialized = False

    def crop(self, *_: object) -> None:
        pass

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None:
            self.keys, self.values = (
                self.keys[indices.to(self.keys.device)],
                self.values[indices.to(self.values.device)],
            )
            self.lengths = None if self.lengths is None else self.lengths[indices.to(self.lengths.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self.batch_select_indices(
                torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats)
            )

    reorder_cache = batch_select_indices


def visual_layer(cache: Cache | None, index: int, text_layers: int) -> VisualLayer | None:
    """The ``index``-th visual layer behind the text layers, or None if the cache has none."""
    position = text_layers + index
    return cache.layers[position] if isinstance(cache, Cache) and position < len(cache.layers) else None


def add_visual_layer(cache: Cache, index: int, text_layers: int) -> VisualLayer:
    """As ``visual_layer``, but creates a missing layer."""
    while len(cache.layers) < text_layers:  # a dynamic cache creates its text layers at their first update
        cache.layers.append(cache.layer_class_to_replicate())
    while len(cache.layers) <= text_layers + index:
        cache.layers.append(VisualLayer())
    return cache.layers[text_layers + index]


def holds_images(cache: Cache | None, text_layers: int) -> bool:
    layer = visual_layer(cache, 0, text_layers)
    return layer is not None and layer.is_initialized
