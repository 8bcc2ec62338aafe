"""Layer and KV-cache handles, checked once: in decode, checks and dispatch cost as much as small layers."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from qvl_kernels import checks, dispatch, tuning
from qvl_kernels.gpu import device as gpu_device
from qvl_kernels.library import has_memory, is_eligible, needs_dispatcher
from qvl_kernels.ops.attention.api import unsupported_heads
from qvl_kernels.ops.decoder_layer.caches import check_caches
from qvl_kernels.ops.decoder_layer.call import OP, DecoderWeights, check_type, check_weights, run_decoder_layer
from qvl_kernels.ops.decoder_layer.cpu import (
    attends_by_pytorch,
    cache_handle,
    layer_handle,
    run_extension_layers,
    run_to_last,
)
from qvl_kernels.ops.decoder_layer.unfused import unfused_decoder_layer
from qvl_kernels.ops.linear.selection import MIN_ROWS, linear_kinds
from qvl_kernels.ops.linear.weights import tensors_of

__all__ = ["PreparedCache", "PreparedDecoderLayer", "Run"]


class PreparedCache:
    """KV-cache handle of a layer, for many calls of ``PreparedDecoderLayer.run``.

    They must not come to need gradients while this object is used; it keeps them alive.

    Args:
        k_cache, v_cache: [B, Hkv, S_cap, D], as for ``decoder_layer``.
    Attributes:
        sizes: (dtype, B, Hkv, D). capacity: S_cap.
        eligible: whether kernels can take the caches' memory directly. extension: the C++ handle, on the CPU.
        storages: addresses of the caches' storages.
    Raises: TypeError or ValueError for another shape or dtype, shared memory, or a cache that needs a gradient.
    Example:
        >>> cache = qvl_kernels.PreparedCache(torch.zeros(1, 8, 512, 128), torch.zeros(1, 8, 512, 128))
    """

    __slots__ = ("_capacity", "_memory", "eligible", "extension", "k_cache", "sizes", "storages", "v_cache")

    def __init__(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        check_caches("PreparedCache", k_cache, v_cache)
        batch, kv_heads, self._capacity, head_dim = k_cache.shape
        self.k_cache, self.v_cache, self.sizes = k_cache, v_cache, (k_cache.dtype, batch, kv_heads, head_dim)
        self.extension: Any = None
        self.storages: frozenset[int] = frozenset()
        self.eligible = not torch.compiler.is_compiling() and all(
            type(x) is torch.Tensor and is_eligible(x, x.device.type) and x.stride(3) == 1 for x in (k_cache, v_cache)
        )
        if self.eligible:
            self.storages = frozenset(_storage(x) for x in (k_cache, v_cache))
            if k_cache.is_cpu:
                self.extension = cache_handle(k_cache, v_cache)
        self._memory = _memory_of((k_cache, v_cache)) if self.eligible else []

    @property
    def capacity(self) -> int:
        return self._capacity

    def _handle(self) -> Any:
        """``extension``. Raises: RuntimeError if the caches were resized or moved since this object was made."""
        if _memory_of((self.k_cache, self.v_cache)) != self._memory:
            raise RuntimeError(
                f"{OP}: the KV cache was resized or moved since its PreparedCache was made; make another"
            )
        return self.extension

    def __reduce__(self) -> tuple:
        return PreparedCache, (self.k_cache, self.v_cache)


class PreparedDecoderLayer:
    """Layer handle: ``decoder_layer`` for many calls on the same weights, with less time per call.

    Calls that are not eligible for the fast path go through ``decoder_layer``. The object keeps the weights alive.

    Args:
        weights: as for ``decoder_layer``.
        num_heads, kv_heads: query and key/value heads. eps, scale: as for ``decoder_layer``.
    Raises: TypeError or ValueError for weights that do not fit together.
    Example:
        >>> layer = qvl_kernels.PreparedDecoderLayer(weights, num_heads=16, kv_heads=8, eps=1e-6, scale=128**-0.5)
        >>> y = layer(x, cos, sin, k_cache, v_cache, past=300)
    """

    ROWS = MIN_ROWS  # the fast path takes fewer tokens than this; more may go to PyTorch's linear

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
        )  # layers with equal sizes can run on the same inputs
        device = weights.input_norm.device.type
        self._eligible = all(is_eligible(x, device) for x in self._tensors())
        self._layer_handle = None
        self._memory = _memory_of(self._tensors()) if self._eligible else []
        _, matrices, _ = weights.groups()
        self._kinds = {few: linear_kinds(self.dtype, few, matrices) for few in (False, True)}

    def _tensors(self) -> list[torch.Tensor]:
        return [x for weight in self.weights if weight is not None for x in tensors_of(weight)]

    def _shapes(self, weights: DecoderWeights) -> DecoderWeights:
        """The tensors whose shapes are checked: the weights, or placeholders of quantised ones."""
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
        """Runs layers one after the other, each on the output of the one before; eligible calls are one C++ call.

        One call is faster than one per layer: the weights of a layer evict Python's data from the CPU caches.

        Args:
            layers: layer handles, at least one. x, cos, sin, past, mask: as for ``decoder_layer``. caches: one per
                layer.
        Returns:
            The output of every layer, each [B, T, C].
        Raises: as ``decoder_layer``; RuntimeError if weights or caches were resized or moved since their handles were
            made.
        Example:
            >>> caches = [PreparedCache(k1, v1), PreparedCache(k2, v2)]
            >>> *_, y = PreparedDecoderLayer.run([first, second], x, cos, sin, caches, past=300)
        """
        try:
            eligible = _is_eligible(layers, x, cos, sin, caches, past, mask)
        except AttributeError:  # an argument is not a layer; the check below says so
            eligible = False
        if not eligible or not x.is_cpu:
            layers, caches = _checked("layers", layers, PreparedDecoderLayer), _checked("caches", caches, PreparedCache)
            if not layers or len(layers) != len(caches):
                raise ValueError(
                    f"{OP}: every layer needs a cache, and there must be one layer, got {len(layers)} layers and "
                    f"{len(caches)} caches"
                )
            outs = []
            parts = [] if eligible else _alike(layers, caches, x)
            if len(parts) > 1:  # one layer that is not eligible does not keep the others from one call
                for part, part_caches in parts:
                    outs += PreparedDecoderLayer.run(part, x, cos, sin, part_caches, past=past, mask=mask)
                    x = outs[-1]
                return outs
            for layer, cache in zip(layers, caches):
                x = (layer._run_unfused if eligible else layer._run_checked)(
                    x, cos, sin, cache.k_cache, cache.v_cache, past, mask
                )
                outs.append(x)
            return outs
        cache_handles = [cache._handle() for cache in caches]
        return run_extension_layers(
            [layer._handle() for layer in layers], x, cos, sin, cache_handles, past, mask, layers[0].num_heads
        )

    def _handle(self) -> Any:
        """The C++ handle of the layer, created at first use.

        Raises: RuntimeError if a weight was resized or moved since this object was made.
        """
        if _memory_of(self._tensors()) != self._memory:
            raise RuntimeError(f"{OP}: a weight was resized or moved since the layer was prepared; prepare it again")
        if self._layer_handle is None:
            self._layer_handle = layer_handle(
                *self.weights.groups(), self.num_heads, self.kv_heads, self.head_dim, self.eps, self.scale
            )
        return self._layer_handle

    def _one_call(self, rows: int) -> bool:
        """Whether the extension computes the layer for ``rows`` tokens in one call."""
        return self._eligible and rows < self.ROWS and not self._prefers_pytorch(rows)

    def _prefers_pytorch(self, rows: int) -> bool:
        """Whether PyTorch's linear multiplies ``rows`` tokens with any of the weights."""
        return any(tuning.chosen(kind) == tuning.PYTORCH for kind in self._kinds[rows < MIN_ROWS])

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
        """The unfused layer, for arguments that are already checked."""
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
        """The layer with all checks, for calls that are not eligible."""
        return run_decoder_layer(
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
    """``PreparedDecoderLayer.run`` that checks the first call only: between calls only ``past``, the length of a mask
    and values of tensors change.

    Args:
        layers, caches: as for ``run``; the lists must not change.
    """

    __slots__ = ("_caches", "_handles", "_layers")

    def __init__(self, layers: list[PreparedDecoderLayer], caches: list[PreparedCache]) -> None:
        self._layers, self._caches = layers, caches
        self._handles: tuple[list, list] | None = None  # C++ handles of layers and caches

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, past: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The output of the last layer. ``past`` must leave room in the caches."""
        layers, caches = self._layers, self._caches
        if self._handles is None:
            if not x.is_cpu or not _is_eligible(layers, x, cos, sin, caches, past, mask):
                return PreparedDecoderLayer.run(layers, x, cos, sin, caches, past=past, mask=mask)[-1]
            self._handles = [layer._handle() for layer in layers], [cache._handle() for cache in caches]
        handles, cache_handles = self._handles
        return run_to_last(handles, x, cos, sin, cache_handles, past, mask, layers[0].num_heads)


def _alike(
    layers: list[PreparedDecoderLayer], caches: list[PreparedCache], x: torch.Tensor
) -> list[tuple[list[PreparedDecoderLayer], list[PreparedCache]]]:
    """(layers, caches) of consecutive layers that the extension all computes in one call, or that it does not."""
    if type(x) is not torch.Tensor or not x.is_cpu or x.dim() != 3 or needs_dispatcher() or torch.jit.is_tracing():
        return []
    rows = x.shape[0] * x.shape[1]
    groups = [list(group) for _, group in itertools.groupby(zip(layers, caches), lambda pair: pair[0]._one_call(rows))]
    return [([layer for layer, _ in group], [cache for _, cache in group]) for group in groups]


def _memory_of(tensors: Sequence[torch.Tensor]) -> list[tuple]:
    return [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in tensors]


def _storage(x: torch.Tensor) -> int:
    """Address of a tensor's storage."""
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
    """The guard of the fast path: whether the extension, or on a GPU the single kernels, can be called directly.

    All other calls, errors included, are left to ``decoder_layer``.
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
        and not (on_cpu and attends_by_pytorch(x, head_dim, past, mask))
    ):
        return False
    sizes, rows, cached = layers[0].sizes, batch * time, (dtype, batch, kv_heads, head_dim)
    for layer, cache in zip(layers, caches):  # runs once per layer and token
        if type(cache) is not PreparedCache or layer.sizes != sizes or on_cpu and not layer._one_call(rows):
            return False
        if cache.sizes != cached or not 0 <= past <= cache.capacity - time:
            return False
        if cache.extension is None if on_cpu else not cache.eligible or cache.k_cache.device != device:
            return False
        if not on_cpu and (not layer._eligible or layer.weights.input_norm.device != device):
            return False
        if not cache.storages.isdisjoint(storages):  # an input may be overwritten before it is read
            return False
    return True


def _broadcasts(mask: torch.Size, full: tuple[int, int, int, int]) -> bool:
    """Whether ``mask`` is [B or 1, H or 1, T or 1, >= keys], which broadcasts to ``full``."""
    return mask[0] in (1, full[0]) and mask[1] in (1, full[1]) and mask[2] in (1, full[2]) and mask[3] >= full[3]
