"""A token on the CPU: one call of the extension for all decoder layers that follow one another, one each for embedding,
norm and head.
"""

from torch import Tensor, nn
from transformers.cache_utils import Cache

from qvl_kernels import PreparedCache, PreparedDecoderLayer, dispatch
from qvl_kernels.ops.linear.weights import tensors_of
from qvl_model.generation.inputs import body_why_not, cache_places, token_inputs
from qvl_model.generation.kv_cache import Store, open_store
from qvl_model.modules.decoder_layer import plan_of

__all__ = ["CpuStep", "why_not"]

_ROOM = 256  # positions by which the mask grows


def why_not(model: nn.Module) -> str | None:
    """Why the layers of a model cannot be one call as they are now, or None."""
    if dispatch.forced() not in (None, "cpp"):
        return f"the backend {dispatch.forced()} is forced"
    return body_why_not(model.model.language_model)


class CpuStep:
    """The tokens of one call of ``generate`` after the first; see ``loop``. ``begin`` makes one.

    Args:
        model: whose layers ``why_not`` has nothing against.
        cache: keys and values of all tokens before the next one; a DynamicCache, or a StaticCache with room for all.
        positions: int64 [3, B, 1] (QVL: [B, 1]), of the next token.
        visible: bool [B, keys], the next one included: False at padding; None if there is none.
    Attributes:
        length: tokens in the cache.
    """

    def __init__(self, model: nn.Module, cache: Cache, positions: Tensor, visible: Tensor | None) -> None:
        self._model, self._body, self._cache = model, model.model.language_model, cache
        self._positions, self._visible = positions.clone(), None if visible is None else visible[:, None, None]
        self._layers = list(self._body.layers)
        self._calls, self._places = [plan_of(layer).prepared for layer in self._layers], cache_places(self._body)
        # Who swaps a weight's data meanwhile frees what the calls read.
        self._alive = [
            x.detach()
            for call in self._calls
            for weight in call.weights
            if weight is not None
            for x in tensors_of(weight)
        ]
        self._stores: list[Store] = []
        self.length = int(cache.get_seq_length())

    @classmethod
    def begin(cls, model: nn.Module, cache: Cache, positions: Tensor, visible: Tensor | None) -> "CpuStep | None":
        """A step, or None if some layer of the cache is kept in another way."""
        step = cls(model, cache, positions, visible)
        return step if step._open() else None

    def run(self, tokens: Tensor) -> Tensor | None:
        """The logits [B, V] after ``tokens`` int64 [B, 1]; None where a static cache is full."""
        hidden, cos, sin = token_inputs(self._body, tokens, self._positions)
        if self.length == self._capacity and not self._open():
            return None
        mask = self._mask()
        for layer, calls, memories in self._stretches:
            if layer is not None:
                hidden = layer.fuse(hidden, None, None, self._cache, False)
            hidden = PreparedDecoderLayer.run(calls, hidden, cos, sin, memories, past=self.length, mask=mask)[-1]
        self.length += 1
        self._positions += 1
        return self._model.lm_head(self._body.norm(hidden))[:, -1]

    def holds(self) -> bool:
        """Whether the model's layers are still those that this step runs."""
        same = (
            self._model.model.language_model is self._body
            and why_not(self._model) is None
            and cache_places(self._body) == self._places
        )
        return same and all(plan_of(layer).prepared is call for layer, call in zip(self._body.layers, self._calls))

    def end(self, length: int) -> None:
        """Leaves the cache with the first ``length`` tokens, as stock code does."""
        for store in self._stores:
            store.commit(length - store.past)

    def _open(self) -> bool:
        """Makes room for tokens, if the cache lets it."""
        self.end(self.length)
        self._stores = []
        like = self._body.norm.weight.new_empty(self._positions.shape[-2], 1, 0)
        stores = [
            open_store(self._cache, place, like, call.kv_heads, call.head_dim)
            for place, call in zip(self._places, self._calls)
        ]
        if any(store is None or store.past != self.length for store in stores):
            return False
        self._stores, self._capacity = stores, min(store.memory.capacity for store in stores)
        self._stretches = _stretches(self._layers, self._calls, [store.memory for store in stores])
        return True

    def _mask(self) -> Tensor | None:
        if self._visible is None:
            return None
        keys = self.length + 1
        if self._visible.shape[3] < keys:
            self._visible = nn.functional.pad(self._visible, (0, _ROOM), value=True)
        return self._visible[..., :keys]


def _stretches(layers: list, calls: list, memories: list[PreparedCache]) -> list[tuple]:
    """(layer that begins with cross-attention or None, calls, memories): layers that are one call, as far as
    cross-attention lets them.
    """
    found = []
    for layer, call, memory in zip(layers, calls, memories):
        fuses = getattr(layer, "fusion", None) is not None
        if fuses or not found or found[-1][1][-1].sizes != call.sizes:
            found.append((layer if fuses else None, [], []))
        found[-1][1].append(call)
        found[-1][2].append(memory)
    return found
