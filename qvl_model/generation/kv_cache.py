"""KV caches of transformers as memory that kernels write new tokens into, instead of a copy of the cache per token.

A ``DynamicLayer`` stays one: ``layer.keys`` and ``layer.values`` are tensors of the exact length. Here they are views
of larger memory, so that the next tokens have room. Our state is kept outside of caches and layers, which users copy,
export and offload.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from qvl_kernels import PreparedCache
from qvl_kernels.memory import pages
from qvl_model.modules.fast_path import own

__all__ = ["WriteSlots", "forget", "updates_as_stock", "reserve_slots"]

_ROOM = 64  # tokens of room to grow at least; a thirty-second of the length when that is more


_UPDATES = {kind: own(kind.update) for kind in (Cache, DynamicLayer, StaticLayer)}


def updates_as_stock(kept: Cache | DynamicLayer | StaticLayer, kind: type) -> bool:
    """Whether the ``update`` of a cache or layer is transformers' own for the class ``kind``, and not one that evicts,
    quantises or counts.
    """
    return type(kept).update is _UPDATES[kind] and "update" not in kept.__dict__


class _Grown:
    """The memory [B, Hkv, S_cap, D] of a DynamicLayer, and the views of it that the layer got last.

    If the layer has other tensors (after crop, reorder, select, update, ...), it no longer uses this memory, and no
    copy of a layer does. So at most one layer extends the memory, and each position is written once.
    """

    __slots__ = ("keys", "memory", "values")

    def __init__(self, memory: PreparedCache) -> None:
        self.memory, self.keys, self.values = memory, None, None

    def show(self, layer: DynamicLayer, length: int) -> None:
        """Gives the layer the first ``length`` positions."""
        self.keys = layer.keys = self.memory.k_cache.narrow(2, 0, length)
        self.values = layer.values = self.memory.v_cache.narrow(2, 0, length)

    def belongs_to(self, layer: DynamicLayer) -> bool:
        memory = self.memory
        return (
            layer.keys is self.keys
            and layer.values is self.values
            and self.keys.data_ptr() == memory.k_cache.data_ptr()
            and self.values.data_ptr() == memory.v_cache.data_ptr()
        )


_grown: "weakref.WeakKeyDictionary[DynamicLayer, _Grown]" = weakref.WeakKeyDictionary()
_static: "weakref.WeakKeyDictionary[StaticLayer, PreparedCache]" = weakref.WeakKeyDictionary()


def forget(layer: DynamicLayer) -> None:
    """Frees the memory of a layer whose keys and values another owner has taken over."""
    _grown.pop(layer, None)


@dataclass(slots=True)
class WriteSlots:
    """Where a layer's new keys and values go: positions [past, past + T) of ``memory``."""

    memory: PreparedCache
    past: int
    visible_capacity: int  # keys that the cache returns to stock attention after the update
    layer: DynamicLayer | StaticLayer | None = None
    grown: _Grown | None = None  # of a DynamicLayer

    def commit(self, queries: int) -> None:
        """Tells the cache layer that ``queries`` positions were written."""
        if self.grown is not None:
            self.grown.show(self.layer, self.past + queries)
        elif self.layer is not None:
            self.layer.cumulative_length.add_(queries)


def reserve_slots(cache: Cache | None, index: int, x: Tensor, kv_heads: int, head_dim: int) -> WriteSlots | None:
    """Write slots for the keys and values of x [B, T, C] in layer ``index`` of the KV cache, or None where stock code
    must update it.
    """
    batch, queries, _ = x.shape
    if cache is None:
        keys = x.new_empty(batch, kv_heads, queries, head_dim)
        return WriteSlots(PreparedCache(keys, torch.empty_like(keys)), 0, queries)
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        return None
    if not updates_as_stock(cache, Cache):
        return None
    layers, sizes = cache.layers, (x.dtype, batch, kv_heads, head_dim)
    while index >= len(layers) and cache.layer_class_to_replicate is DynamicLayer:
        layers.append(DynamicLayer())
    if index >= len(layers):
        return None
    layer = layers[index]
    kind = type(layer)
    if kind not in (DynamicLayer, StaticLayer) or not updates_as_stock(layer, kind):
        return None
    if torch.is_grad_enabled() and layer.is_initialized and (layer.keys.requires_grad or layer.values.requires_grad):
        return None
    return (_dynamic_slots if kind is DynamicLayer else _static_slots)(layer, x, sizes)


def _matches(layer: DynamicLayer | StaticLayer, x: Tensor, sizes: tuple) -> bool:
    keys, values = layer.keys, layer.values
    return (
        not (keys.requires_grad or values.requires_grad)
        and keys.device == values.device == x.device
        and keys.dim() == 4
        and keys.shape == values.shape
        and keys.dtype is values.dtype
        and (keys.dtype, keys.shape[0], keys.shape[1], keys.shape[3]) == sizes
    )


def _dynamic_slots(layer: DynamicLayer, x: Tensor, sizes: tuple) -> WriteSlots | None:
    past, grown = layer.get_seq_length(), _grown.get(layer)
    if grown is not None and not (past and grown.belongs_to(layer)):
        grown = None
    on_cpu = x.is_cpu and grown is not None and grown.memory.extension is not None  # the cheaper check
    if past and not (grown.memory.sizes == sizes if on_cpu else _matches(layer, x, sizes)):
        return None
    end = past + x.shape[1]
    if grown is None or grown.memory.capacity < end:
        _, batch, kv_heads, head_dim = sizes
        shape = (batch, kv_heads, end + max(_ROOM, end // 32), head_dim)
        keys = pages.empty(x, shape, x.dtype)
        grown = _Grown(PreparedCache(keys, pages.empty(x, shape, x.dtype)))
        if past:  # moved at once, so that only one layer at a time has both old and new memory
            grown.memory.k_cache.narrow(2, 0, past).copy_(layer.keys)
            grown.memory.v_cache.narrow(2, 0, past).copy_(layer.values)
            grown.show(layer, past)
        elif not layer.is_initialized:
            layer.lazy_initialization(keys, keys)
        _grown[layer] = grown
    return WriteSlots(grown.memory, past, end, layer, grown)


def _static_slots(layer: StaticLayer, x: Tensor, sizes: tuple) -> WriteSlots | None:
    dtype, batch, kv_heads, head_dim = sizes
    if not layer.is_initialized:
        shape = x.new_empty(batch, kv_heads, 0, head_dim)
        layer.lazy_initialization(shape, shape)
    past = int(layer.cumulative_length)
    if not _matches(layer, x, sizes) or past + x.shape[1] > layer.max_cache_len:
        return None
    memory = _static.get(layer)
    if memory is None or memory.k_cache is not layer.keys or memory.v_cache is not layer.values:
        memory = _static[layer] = PreparedCache(layer.keys, layer.values)
    return WriteSlots(memory, past, layer.max_cache_len, layer)
