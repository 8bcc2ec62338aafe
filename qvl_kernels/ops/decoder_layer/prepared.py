"""Decoder layers and caches that are checked once: for decoding, where checks and dispatch would cost as much as small
layers.
"""

from collections.abc import Sequence
from typing import Any

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.gpu import device as gpu_device
from qvl_kernels.library import has_memory, is_eligible, needs_dispatcher
from qvl_kernels.ops.attention.api import unsupported_heads
from qvl_kernels.ops.decoder_layer.api import OP, DecoderWeights, check_type, check_weights, decoder_layer
from qvl_kernels.ops.decoder_layer.caches import check_caches
from qvl_kernels.ops.decoder_layer.cpu import extension_cache, extension_layer, run_extension_layers, run_to_last
from qvl_kernels.ops.decoder_layer.unfused import unfused_decoder_layer
from qvl_kernels.ops.linear.onednn import MIN_ROWS
from qvl_kernels.ops.linear.weights import tensors_of

__all__ = ["PreparedCache", "PreparedDecoderLayer", "Run"]


class PreparedCache:
    """Keys and values of a layer, for many calls of ``PreparedDecoderLayer.run``.

    They must not be resized or moved, or come to need gradients, while this object is used; it keeps them alive.

    Args:
        k_cache, v_cache: [B, Hkv, S_cap, D], as for ``decoder_layer``.
    Attributes:
        sizes: (dtype, B, Hkv, D). capacity: S_cap. plain: whether kernels take them as they are. extension: as the
            extension takes them, on the CPU.
        storages: where their memory begins.
    Raises: TypeError or ValueError for what is no cache: another shape or dtype, memory that is shared, or a gradient
    needed.
    Example:
        >>> cache = qvl_kernels.PreparedCache(torch.zeros(1, 8, 512, 128), torch.zeros(1, 8, 512, 128))
    """

    __slots__ = ("capacity", "eligible", "extension", "k_cache", "sizes", "storages", "v_cache")

    def __init__(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        check_caches("PreparedCache", k_cache, v_cache)
        batch, kv_heads, self.capacity, head_dim = k_cache.shape
        self.k_cache, self.v_cache, self.sizes = k_cache, v_cache, (k_cache.dtype, batch, kv_heads, head_dim)
        self.extension: Any = None
        self.storages: frozenset[int] = frozenset()
        self.eligible = not torch.compiler.is_compiling() and all(
            type(x) is torch.Tensor and is_eligible(x, x.device.type) and x.stride(3) == 1 for x in (k_cache, v_cache)
        )
        if self.eligible:
            self.storages = frozenset(_storage(x) for x in (k_cache, v_cache))
            if k_cache.is_cpu:
                self.extension = extension_cache(k_cache, v_cache)

    def __reduce__(self) -> tuple:
        return PreparedCache, (self.k_cache, self.v_cache)


class PreparedDecoderLayer:
    """``decoder_layer`` for many calls on the same weights: the same results, less time per call.

    Calls that are not plain inference over few CPU tokens go through ``decoder_layer``. The weights must not be resized
    or freed while this object is used; it keeps them alive.

    Args:
        weights: as for ``decoder_layer``.
        num_heads, kv_heads: query and key/value heads. eps, scale: as for ``decoder_layer``.
    Raises: TypeError or ValueError for weights that do not fit together.
    Example:
        >>> layer = qvl_kernels.PreparedDecoderLayer(weights, num_heads=16, kv_heads=8, eps=1e-6, scale=128**-0.5)
        >>> y = layer(x, cos, sin, k_cache, v_cache, past=300)
    """

    ROWS = MIN_ROWS  # fewer than these; more may go to oneDNN

    def __init__(
        self, weights: DecoderWeights, *, num_heads: int, kv_heads: int, eps: float, scale: float | None
    ) -> None:
        check_type(weights)
        checks.check_tensor(OP, "input_norm", weights.input_norm, 1)
        checks.check_tensor(OP, "q_norm", weights.q_norm, 1)
        hidden, head_dim = weights.input_norm.shape[0], weights.q_norm.shape[0]
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"{OP}: head_dim must be even to rotate halves, got {head_dim} in q_norm")
        self.num_heads, self.kv_heads = (
            checks.check_int(OP, "num_heads", num_heads, 1),
            checks.check_int(OP, "kv_heads", kv_heads, 1),
        )
        self.eps, self.scale = checks.check_eps(OP, eps), checks.check_scale(OP, scale, head_dim)
        check_weights(
            weights.input_norm.new_empty(0, 0, hidden), self._shapes(weights), self.num_heads, self.kv_heads, head_dim
        )
        self.weights, self.head_dim, self.dtype = weights, head_dim, weights.input_norm.dtype
        self.sizes = (
            self.dtype,
            hidden,
            self.num_heads,
            self.kv_heads,
            head_dim,
        )  # layers that share them run on the same inputs
        device = weights.input_norm.device.type
        self._eligible = all(
            is_eligible(x, device) for weight in weights if weight is not None for x in tensors_of(weight)
        )
        self._extension_layer = None

    def _shapes(self, weights: DecoderWeights) -> DecoderWeights:
        """What is checked in place of the weights."""
        return weights

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        past: int,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As ``decoder_layer``."""
        return PreparedDecoderLayer.run([self], x, cos, sin, [PreparedCache(k_cache, v_cache)], past=past, mask=mask)[0]

    @staticmethod
    def run(
        layers: Sequence["PreparedDecoderLayer"],
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        caches: Sequence[PreparedCache],
        *,
        past: int,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Layers one after the other, each on the output of the one before, in one call of the extension where that is
        possible.

        Between two calls of the extension the weights of a layer push what Python looks at out of the processor's
        caches.

        Args:
            layers: prepared layers, at least one. x, cos, sin, past, mask: as for ``decoder_layer``. caches: of each
                layer.
        Returns:
            The output of every layer, each [B, T, C].
        Raises: as ``decoder_layer``.
        Example:
            >>> caches = [PreparedCache(k1, v1), PreparedCache(k2, v2)]
            >>> *_, y = PreparedDecoderLayer.run([first, second], x, cos, sin, caches, past=300)
        """
        try:
            eligible = _is_eligible(layers, x, cos, sin, caches, past, mask)
        except AttributeError:  # of what is no layer, which is said below
            eligible = False
        if not eligible or not x.is_cpu:
            layers, caches = _checked("layers", layers, PreparedDecoderLayer), _checked("caches", caches, PreparedCache)
            if not layers or len(layers) != len(caches):
                raise ValueError(
                    f"{OP}: every layer needs a cache, and there must be one layer, got {len(layers)} layers and "
                    f"{len(caches)} caches"
                )
            outs = []
            for layer, cache in zip(layers, caches):
                x = (layer._run_unfused if eligible else layer._run_checked)(
                    x, cos, sin, cache.k_cache, cache.v_cache, past, mask
                )
                outs.append(x)
            return outs
        memories = [cache.extension for cache in caches]
        return run_extension_layers(
            [layer._extension() for layer in layers], x, cos, sin, memories, past, mask, layers[0].num_heads
        )

    def _extension(self) -> Any:
        """The layer as the extension takes it."""
        if self._extension_layer is None:
            self._extension_layer = extension_layer(
                *self.weights.groups(), self.num_heads, self.kv_heads, self.head_dim, self.eps, self.scale
            )
        return self._extension_layer

    def _one_call(self, rows: int) -> bool:
        """Whether the extension computes the layer for so many rows in one call."""
        return self._eligible and rows < self.ROWS

    def _run_unfused(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        past: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The layer from single ops, of arguments that are known to fit together."""
        return unfused_decoder_layer(
            x, *self.weights.groups(), cos, sin, k_cache, v_cache, past, mask, self.num_heads, self.eps, self.scale
        )

    def _run_checked(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        past: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The layer of arguments that are not plain; refuses what does not fit together."""
        return decoder_layer(
            x,
            self.weights,
            cos,
            sin,
            k_cache,
            v_cache,
            past=past,
            mask=mask,
            num_heads=self.num_heads,
            eps=self.eps,
            scale=self.scale,
        )


class Run:
    """``PreparedDecoderLayer.run`` for calls between which only ``past``, the length of a mask and numbers in tensors
    change: checked at the first one.

    Args:
        layers, caches: as for ``run``; the lists must not change.
    """

    __slots__ = ("_caches", "_handles", "_layers")

    def __init__(self, layers: list[PreparedDecoderLayer], caches: list[PreparedCache]) -> None:
        self._layers, self._caches = layers, caches
        self._handles: tuple[list, list] | None = None  # of the extension

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, past: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The output of the last layer. ``past`` must leave room in the caches."""
        layers, caches = self._layers, self._caches
        if self._handles is None:
            if not x.is_cpu or not _is_eligible(layers, x, cos, sin, caches, past, mask):
                return PreparedDecoderLayer.run(layers, x, cos, sin, caches, past=past, mask=mask)[-1]
            self._handles = [layer._extension() for layer in layers], [cache.extension for cache in caches]
        handles, memories = self._handles
        return run_to_last(handles, x, cos, sin, memories, past, mask, layers[0].num_heads)


def _storage(x: torch.Tensor) -> int:
    """Where the memory begins that a tensor is a part of."""
    return x.untyped_storage().data_ptr()


def _checked(name: str, items: object, kind: type) -> list:
    if not isinstance(items, Sequence) or not all(isinstance(item, kind) for item in items):
        raise TypeError(f"{OP}: {name} must be a sequence of {kind.__name__}, got {items!r:.80}")
    return list(items)


def _is_eligible(
    layers: Sequence[PreparedDecoderLayer],
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    caches: Sequence[PreparedCache],
    past: int,
    mask: torch.Tensor | None,
) -> bool:
    """Whether the extension, or on a GPU the kernels one by one, may be called as things are; whatever is odd, errors
    included, is left to ``decoder_layer``.
    """
    if (
        type(x) is not torch.Tensor
        or type(past) is not int
        or type(layers) is not list
        or type(caches) is not list
        or needs_dispatcher()
    ):
        return False
    if not layers or len(layers) != len(caches):
        return False
    shape, (dtype, hidden, heads, kv_heads, head_dim) = x.shape, layers[0].sizes
    on_cpu, device = x.is_cpu, x.device
    if len(shape) != 3:
        return False
    if not on_cpu and (not x.is_cuda or unsupported_heads(x, head_dim) is not None):
        return False
    kind, storages = "cpu" if on_cpu else "cuda", set()
    for tensor in (x, cos, sin) if mask is None else (x, cos, sin, mask):
        if not is_eligible(tensor, kind) or tensor.device != device or tensor.requires_grad or not has_memory(tensor):
            return False
        if tensor.dtype is not dtype and (tensor is not mask or tensor.dtype is not torch.bool):
            return False
        storages.add(_storage(tensor))
    batch, time, _ = shape
    tables = (1, time, head_dim), (batch, time, head_dim)
    if not (
        shape[2] == hidden
        and x.is_contiguous()
        and cos.shape in tables
        and sin.shape in tables
        and cos.stride()[2] == sin.stride()[2] == 1
        and (mask is None or mask.dim() == 4 and _broadcasts(mask.shape, (batch, heads, time, past + time)))
        and dispatch.forced() in (None, "cpp" if on_cpu else "triton")
        and (on_cpu or gpu_device.unavailable(device) is None)
    ):
        return False
    sizes, rows, cached = layers[0].sizes, batch * time, (dtype, batch, kv_heads, head_dim)
    for layer, cache in zip(layers, caches):  # once per layer and token
        if type(cache) is not PreparedCache or layer.sizes != sizes or on_cpu and not layer._one_call(rows):
            return False
        if cache.sizes != cached or not 0 <= past <= cache.capacity - time:
            return False
        if cache.extension is None if on_cpu else not cache.eligible or cache.k_cache.device != device:
            return False
        if not on_cpu and (not layer._eligible or layer.weights.input_norm.device != device):
            return False
        if not cache.storages.isdisjoint(storages):  # may be written to before it is read
            return False
    return True


def _broadcasts(mask: torch.Size, full: tuple[int, int, int, int]) -> bool:
    """A mask [B or 1, H or 1, T or 1, >= keys] over ``full``."""
    return mask[0] in (1, full[0]) and mask[1] in (1, full[1]) and mask[2] in (1, full[2]) and mask[3] >= full[3]
