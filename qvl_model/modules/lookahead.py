"""All decoder layers of a token in one call: the first computes what the next ones will be asked for.

Each token's weights push what Python looks at out of the processor's caches, so that between two calls into the extension everything
comes from memory. So a layer runs those that followed it in the last token too. They are called as ever, with their hooks, and
give what is there if they are called with exactly what it was made from; else they compute, and overwrite what was
written ahead into their part of the cache, which nobody has seen before ``commit``.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from qvl_kernels import PreparedDecoderLayer, dispatch
from qvl_model.cache import Store
from qvl_model.compat import CACHE

__all__ = ["LookAhead", "Step", "followers", "learned", "look_ahead", "output_ahead"]



@dataclass(slots=True)
class Step:
    """A layer, its fused call, where its keys and values go, and, once it has run, its output."""

    layer: nn.Module
    prepared: PreparedDecoderLayer
    store: Store
    out: Tensor | None = None

    def looked_at(self) -> Iterator[object]:
        """What Python looks at for every token to keep a layer's keys and values."""
        memory, kept = self.store.memory, self.store.layer
        yield from (self.layer, self.prepared, memory, memory.extension, kept, vars(kept))


@dataclass(slots=True)
class LookAhead:
    """What the layers of one cache have computed ahead.

    Attributes:
        layer, out: the layer that was asked last, and its output.
        waiting: layers that have run since but were not asked yet, the next one last.
        tables, mask: what they have run with.
        memories, footprint: of the layers that last ran together, ids of what their keys and values lie in (which must not live on here when
            a cache has grown out of it), and all that is looked at for them.
    """

    layer: "weakref.ref[nn.Module] | None" = None
    out: Tensor | None = None
    waiting: list[Step] = field(default_factory=list)
    tables: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    memories: list[int] = field(default_factory=list)
    footprint: object | None = None

    def find(self, layer: nn.Module, x: Tensor, tables: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor | None:
        """The output of ``layer`` on x [B, T, C] if it is there."""
        if (
            self.waiting and self.waiting[-1].layer is layer and self._follows(x) and mask is self.mask
            and tables is not None and tables[0] is self.tables[0] and tables[1] is self.tables[1]
        ):  # fmt: skip
            return self._asked(self.waiting.pop())
        return None

    def take(self, layer: nn.Module, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor | None:
        """The same; if it is not there, nothing is ahead any more, and what follows what is learned."""
        out = self.find(layer, x, tables, mask)
        if out is not None:
            return out
        if self.footprint is not None:
            self.footprint.fetch()
        follows = self._follows(x)
        last = None if self.layer is None else self.layer()
        if last is not None:
            _learn(last, layer if follows else None)
        self.layer, self.out, self.waiting, self.tables, self.mask = None, None, [], None, None
        return None

    def ran(self, steps: list[Step], tables: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Keeps what one call computed; returns the output of its first layer."""
        first, *others = steps
        if others:
            memories = [id(step.store.memory) for step in steps]
            if memories != self.memories:
                self.memories, self.footprint = memories, dispatch.extension().Footprint([x for step in steps for x in step.looked_at()])
            self.footprint.fetch()
        self.waiting, self.tables, self.mask = others[::-1], tables, mask
        return self._asked(first)

    def _follows(self, x: Tensor) -> bool:
        return x is self.out and (x.is_inference() or x._version == 0)  # as it was made; inference tensors count no versions

    def _asked(self, step: Step) -> Tensor:
        step.store.commit(step.out.shape[1])
        self.layer, self.out = weakref.ref(step.layer), step.out
        return step.out


_states: "weakref.WeakKeyDictionary[Cache, LookAhead]" = weakref.WeakKeyDictionary()  # two threads that generate on one model have a cache each
_followers: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]]" = weakref.WeakKeyDictionary()
_lessons = 0


def _learn(layer: nn.Module, following: nn.Module | None) -> None:
    global _lessons
    known = _followers.get(layer)
    if following is not (known and known()):
        _lessons += 1
        if following is None:
            del _followers[layer]
        else:
            _followers[layer] = weakref.ref(following)


def learned() -> int:
    """A number that changes whenever any layer's follower does."""
    return _lessons


def followers(layer: nn.Module) -> Iterator[nn.Module]:
    """The layers that took the outputs of this one and of each other."""
    while (reference := _followers.get(layer)) is not None and (layer := reference()) is not None:
        yield layer


def look_ahead(cache: Cache | None, x: Tensor) -> LookAhead | None:
    """What the layers of this cache know, or None where none of them looks ahead: with x [B, T, C] of many rows, gradients or on GPUs."""
    if (
        torch.compiler.is_compiling()
        or dispatch.forced() not in (None, "cpp")
        or not isinstance(cache, Cache)
        or torch.is_grad_enabled()
        or not x.is_cpu
        or x.dim() != 3
        or x.shape[0] * x.shape[1] >= PreparedDecoderLayer.ROWS
    ):
        return None
    state = _states.get(cache)
    if state is None:
        state = _states[cache] = LookAhead()
    return state


def output_ahead(layer: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    """What a call of ``layer`` with these arguments gives, if it is there. No hook need be called then: layers with hooks do not run ahead."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or len(args) != 1:
        return None
    cache = kwargs.get(CACHE)
    state = _states.get(cache) if isinstance(cache, Cache) else None
    if state is None or not state.waiting:
        return None
    return state.find(layer, args[0], kwargs.get("position_embeddings"), kwargs.get("attention_mask"))
