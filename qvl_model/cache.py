"""Key/value caches of transformers as memory that kernels write into, instead of one copy of the cache per token.

A ``DynamicLayer`` keeps its contract: ``layer.keys`` and ``layer.values`` are real tensors of the exact length. Here they are views
of larger memory, so that the next tokens have room, and are made when somebody looks at them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from qvl_kernels import PreparedCache, pages

__all__ = ["GrowingLayer", "Store", "open_stores"]

_ROOM = 64  # tokens of room to grow at least; a thirty-second of the length when that is more
_MEMORY = "_qvl_memory"  # attributes of cache layers
_LENGTH, _VIEWS = "_qvl_length", "_qvl_views"


class GrowingLayer(DynamicLayer):
    """What a ``DynamicLayer`` is while it has room to grow. Whoever assigns its keys or values (crop, reorder, select, update, ...) turns
    it into a ``DynamicLayer`` again, and so is every copy of it: memory has one layer that extends it, and its positions are written once.

    Example:
        >>> cache.layers[0].keys.shape, type(cache.layers[0]).__mro__[1]
        (torch.Size([1, 8, 322, 128]), <class 'transformers.cache_utils.DynamicLayer'>)
    """

    @classmethod
    def own(cls, layer: DynamicLayer, memory: PreparedCache, length: int) -> None:
        """Makes the layer one whose keys and values are the first ``length`` positions of the memory [B, Hkv, S_cap, D]."""
        state = vars(layer)
        state.pop("keys", None)
        state.pop("values", None)
        state[_MEMORY], state[_LENGTH], state[_VIEWS] = memory, length, None
        layer.__class__ = cls

    def grow(self, length: int) -> None:
        state = vars(self)
        state[_LENGTH], state[_VIEWS] = length, None

    def views(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, S, D]."""
        state = vars(self)
        if state[_VIEWS] is None:
            memory, length = state[_MEMORY], state[_LENGTH]
            state[_VIEWS] = memory.k_cache.narrow(2, 0, length), memory.v_cache.narrow(2, 0, length)
        return state[_VIEWS]

    def get_seq_length(self) -> int:
        return vars(self)[_LENGTH]

    def _plain(self) -> dict:
        """The attributes of the ``DynamicLayer`` that this is to everybody else."""
        keys, values = self.views()
        others = {name: value for name, value in vars(self).items() if name not in (_MEMORY, _LENGTH, _VIEWS)}
        return {**others, "keys": keys, "values": values}

    def _leave(self) -> None:
        state = self._plain()
        self.__class__ = DynamicLayer
        vars(self).clear()
        vars(self).update(state)

    def __reduce__(self) -> tuple:
        return DynamicLayer, (), self._plain()

    @property
    def keys(self) -> Tensor:
        return self.views()[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._leave()
        self.keys = keys

    @property
    def values(self) -> Tensor:
        return self.views()[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._leave()
        self.values = values


@dataclass(slots=True)
class Store:
    """Where a layer's new keys and values go: positions [past, past + T) of ``memory``."""

    memory: PreparedCache
    past: int
    visible_capacity: int  # keys that the cache returns to stock attention after the update
    layer: GrowingLayer | StaticLayer | None = None

    def commit(self, queries: int) -> None:
        """Tells the cache layer that ``queries`` positions were written."""
        layer = self.layer
        if type(layer) is GrowingLayer:
            layer.grow(self.past + queries)
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
        kind = type(layer)
        if kind is GrowingLayer or kind is DynamicLayer:
            store = _dynamic_store(layer, x, sizes)
        else:
            store = _static_store(layer, x, sizes) if kind is StaticLayer else None
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
    ours, past = type(layer) is GrowingLayer, layer.get_seq_length()
    end = past + x.shape[1]
    memory: PreparedCache | None = vars(layer)[_MEMORY] if ours else None
    if past and not (ours and x.is_cpu and memory.extension is not None and memory.sizes == sizes or _matches(layer, x, sizes)):
        return None
    if not ours or not past or memory.capacity < end:
        _, batch, kv_heads, head_dim = sizes
        shape = (batch, kv_heads, end + max(_ROOM, end // 32), head_dim)
        keys = pages.empty(x, shape, x.dtype)
        memory = PreparedCache(keys, pages.empty(x, shape, x.dtype))
        if past:  # what the layer holds moves at once, so that of many layers no two have both
            memory.k_cache.narrow(2, 0, past).copy_(layer.keys)
            memory.v_cache.narrow(2, 0, past).copy_(layer.values)
        elif not layer.is_initialized:
            layer.lazy_initialization(keys, keys)
        GrowingLayer.own(layer, memory, past)
    return Store(memory, past, end, layer)


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
