"""Key/value caches of transformers as memory that kernels write into, instead of one copy of the cache per token.

A ``DynamicLayer`` keeps its contract: ``layer.keys`` and ``layer.values`` are real tensors of the exact length. They are
views of larger buffers here, so that the next tokens have room. A buffer is extended in place only by the layer whose
views are its newest; any other (copied, cropped, reordered, batch-selected) layer gets a buffer of its own first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

__all__ = ["Store", "open_store"]

_ROOM = 64  # tokens of room to grow at least; a thirty-second of the length when that is more
_BUFFER = "_qvl_buffer"


@dataclass(slots=True)
class _Buffer:
    keys: Tensor  # [B, Hkv, capacity, D]
    values: Tensor
    keys_view: Tensor | None = None  # the views given to the layer last
    values_view: Tensor | None = None


@dataclass(slots=True)
class Store:
    """Where a layer's new keys and values go: positions [past, past + T) of ``keys`` and ``values``."""

    keys: Tensor
    values: Tensor
    past: int
    visible_capacity: int  # keys that the cache returns to stock attention after the update
    layer: DynamicLayer | StaticLayer | None = None
    views: tuple[Tensor, Tensor] | None = None  # what a DynamicLayer will hold

    def commit(self, queries: int) -> None:
        """Tells the cache layer that ``queries`` positions were written."""
        layer = self.layer
        if self.views is not None:
            buffer = layer.__dict__[_BUFFER]
            layer.keys, layer.values = buffer.keys_view, buffer.values_view = self.views
        elif layer is not None:
            layer.cumulative_length.add_(queries)


def open_store(cache: Cache | None, index: int, x: Tensor, kv_heads: int, head_dim: int) -> Store | None:
    """Room for the keys and values of x [B, T, C] in layer ``index`` of the cache, or None if this cache is not known."""
    batch, queries, _ = x.shape
    if cache is None:
        keys = x.new_empty(batch, kv_heads, queries, head_dim)
        return Store(keys, torch.empty_like(keys), 0, queries)
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        return None
    if type(cache).update is not Cache.update or "update" in cache.__dict__:  # a cache that evicts, quantises, counts, ...
        return None
    while index >= len(cache.layers) and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(DynamicLayer())
    if index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is DynamicLayer:
        return _dynamic_store(layer, x, kv_heads, head_dim)
    if type(layer) is StaticLayer:
        return _static_store(layer, x, kv_heads, head_dim)
    return None


def _matches(layer: DynamicLayer | StaticLayer, x: Tensor, kv_heads: int, head_dim: int) -> bool:
    shape = layer.keys.shape
    return (
        layer.keys.dtype is x.dtype
        and layer.keys.device == x.device
        and (shape[0], shape[1], shape[3]) == (x.shape[0], kv_heads, head_dim)
    )


def _dynamic_store(layer: DynamicLayer, x: Tensor, kv_heads: int, head_dim: int) -> Store | None:
    batch, queries, _ = x.shape
    past = layer.get_seq_length()
    if past and not _matches(layer, x, kv_heads, head_dim):
        return None
    end = past + queries
    buffer: _Buffer | None = layer.__dict__.get(_BUFFER)
    if (
        buffer is None
        or not past
        or buffer.keys_view is not layer.keys
        or buffer.values_view is not layer.values
        or buffer.keys.shape[2] < end
    ):
        capacity = end + max(_ROOM, end // 32)
        keys = x.new_empty(batch, kv_heads, capacity, head_dim)
        buffer = _Buffer(keys, torch.empty_like(keys))
        if past:
            buffer.keys[:, :, :past] = layer.keys
            buffer.values[:, :, :past] = layer.values
        elif not layer.is_initialized:
            layer.lazy_initialization(keys, keys)
        setattr(layer, _BUFFER, buffer)
    return Store(buffer.keys, buffer.values, past, end, layer, (buffer.keys.narrow(2, 0, end), buffer.values.narrow(2, 0, end)))


def _static_store(layer: StaticLayer, x: Tensor, kv_heads: int, head_dim: int) -> Store | None:
    batch, queries, _ = x.shape
    if not layer.is_initialized:
        shape = x.new_empty(batch, kv_heads, 0, head_dim)
        layer.lazy_initialization(shape, shape)
    past = int(layer.cumulative_length)
    if not _matches(layer, x, kv_heads, head_dim) or past + queries > layer.max_cache_len:
        return None
    return Store(layer.keys, layer.values, past, layer.max_cache_len, layer)
