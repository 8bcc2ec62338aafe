"""Key/value caches of transformers as memory that kernels write into, instead of one copy of the cache per token.

A ``DynamicLayer`` keeps its contract: ``layer.keys`` and ``layer.values`` are real tensors of the exact length. They are
views of larger buffers here, so that the next tokens have room. A buffer is extended in place only by the layer whose
views are its newest; any other (copied, cropped, reordered, batch-selected) layer gets a buffer of its own first.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from qvl_kernels import PreparedCache

__all__ = ["Store", "open_stores"]

_ROOM = 64  # tokens of room to grow at least; a thirty-second of the length when that is more
_BUFFER = "_qvl_buffer"
_MEMORY = "_qvl_memory"


@dataclass(slots=True)
class _Buffer:
    memory: PreparedCache  # [B, Hkv, capacity, D]
    keys_view: Tensor | None = None  # the views given to the layer last
    values_view: Tensor | None = None
    length: int = 0  # of the views

    def views(self, length: int) -> tuple[Tensor, Tensor]:
        return self.memory.k_cache.narrow(2, 0, length), self.memory.v_cache.narrow(2, 0, length)

    def give(self, layer: DynamicLayer, views: tuple[Tensor, Tensor], length: int) -> None:
        layer.keys, layer.values = self.keys_view, self.values_view = views
        self.length = length


@dataclass(slots=True)
class Store:
    """Where a layer's new keys and values go: positions [past, past + T) of ``memory``."""

    memory: PreparedCache
    past: int
    visible_capacity: int  # keys that the cache returns to stock attention after the update
    layer: DynamicLayer | StaticLayer | None = None
    views: tuple[Tensor, Tensor] | None = None  # what a DynamicLayer will hold

    def commit(self, queries: int) -> None:
        """Tells the cache layer that ``queries`` positions were written."""
        layer = self.layer
        if self.views is not None:
            layer.__dict__[_BUFFER].give(layer, self.views, self.past + queries)
        elif layer is not None:
            layer.cumulative_length.add_(queries)


def open_stores(cache: Cache | None, indices: Iterable[int], x: Tensor, kv_heads: int, head_dim: int) -> list[Store]:
    """Room for the keys and values of x [B, T, C] in layers ``indices`` of the cache, up to the first that is not known or holds more or fewer
    keys than the others. Of an empty cache only the first: the next ones are for the layers to make."""
    batch, queries, _ = x.shape
    if cache is None:
        keys = x.new_empty(batch, kv_heads, queries, head_dim)
        return [Store(PreparedCache(keys, torch.empty_like(keys)), 0, queries)]
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        return []
    if type(cache).update is not Cache.update or "update" in cache.__dict__:  # a cache that evicts, quantises, counts, ...
        return []
    stores: list[Store] = []
    layers, sizes = cache.layers, (x.dtype, batch, kv_heads, head_dim)
    for index in indices:
        while index >= len(layers) and cache.layer_class_to_replicate is DynamicLayer:
            layers.append(DynamicLayer())
        if index >= len(layers):
            break
        layer = layers[index]
        if type(layer) is DynamicLayer:
            store = _dynamic_store(layer, x, sizes)
        else:
            store = _static_store(layer, x, sizes) if type(layer) is StaticLayer else None
        if store is None or stores and (store.past != stores[0].past or store.visible_capacity != stores[0].visible_capacity):
            break
        stores.append(store)
        if store.past == 0:
            break
    return stores


def _matches(layer: DynamicLayer | StaticLayer, x: Tensor, sizes: tuple) -> bool:
    shape = layer.keys.shape
    return layer.keys.device == x.device and (layer.keys.dtype, shape[0], shape[1], shape[3]) == sizes


def _dynamic_store(layer: DynamicLayer, x: Tensor, sizes: tuple) -> Store | None:
    queries = x.shape[1]
    buffer: _Buffer | None = layer.__dict__.get(_BUFFER)
    ours = buffer is not None and buffer.keys_view is layer.keys and buffer.values_view is layer.values
    past = buffer.length if ours else layer.get_seq_length()
    if past and not (ours and x.is_cpu and buffer.memory.extension is not None and buffer.memory.sizes == sizes or _matches(layer, x, sizes)):
        return None
    end = past + queries
    if not ours or not past or buffer.memory.capacity < end:
        _, batch, kv_heads, head_dim = sizes
        keys = x.new_empty(batch, kv_heads, end + max(_ROOM, end // 32), head_dim)
        buffer = _Buffer(PreparedCache(keys, torch.empty_like(keys)))
        setattr(layer, _BUFFER, buffer)
        if past:  # what the layer holds moves at once, so that of many layers no two have both
            keys, values = buffer.views(past)
            keys.copy_(layer.keys)
            values.copy_(layer.values)
            buffer.give(layer, (keys, values), past)
        elif not layer.is_initialized:
            layer.lazy_initialization(keys, keys)
    return Store(buffer.memory, past, end, layer, buffer.views(end))


def _static_store(layer: StaticLayer, x: Tensor, sizes: tuple) -> Store | None:
    dtype, batch, kv_heads, head_dim = sizes
    if not layer.is_initialized:
        shape = x.new_empty(batch, kv_heads, 0, head_dim)
        layer.lazy_initialization(shape, shape)
    past = int(layer.cumulative_length)
    if not _matches(layer, x, sizes) or past + x.shape[1] > layer.max_cache_len:
        return None
    memory: PreparedCache | None = layer.__dict__.get(_MEMORY)
    if memory is None or memory.k_cache is not layer.keys or memory.v_cache is not layer.values:
        memory = PreparedCache(layer.keys, layer.values)
        setattr(layer, _MEMORY, memory)
    return Store(memory, past, layer.max_cache_len, layer)
