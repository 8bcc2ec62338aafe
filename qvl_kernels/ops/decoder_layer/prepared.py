"""Decoder layers and caches that are checked once: for decoding, where checks and dispatch would cost as much as small layers."""

from collections.abc import Sequence

import torch

from qvl_kernels import dispatch, gpu
from qvl_kernels.library import watched
from qvl_kernels.ops.attention import unsupported_heads
from qvl_kernels.ops.decoder_layer import DecoderWeights, check_weights, decoder_layer
from qvl_kernels.ops.decoder_layer.compose import compose_decoder_layer
from qvl_kernels.ops.decoder_layer.cpu import extension_cache, extension_layer, run_extension_layers
from qvl_kernels.ops.linear.onednn import MIN_ROWS

__all__ = ["PreparedCache", "PreparedDecoderLayer"]


class PreparedCache:
    """Keys and values of a layer, for many calls of ``PreparedDecoderLayer.run``.

    They must not be resized or moved while this object is used; it keeps them alive.

    Args:
        k_cache, v_cache: [B, Hkv, S_cap, D].
    Attributes:
        sizes: (dtype, B, Hkv, D). capacity: S_cap. plain: whether kernels take them as they are. extension: as the extension takes them, on the CPU.
    Example:
        >>> cache = qvl_kernels.PreparedCache(torch.zeros(1, 8, 512, 128), torch.zeros(1, 8, 512, 128))
    """

    __slots__ = ("capacity", "extension", "k_cache", "plain", "sizes", "v_cache")

    def __init__(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        self.k_cache, self.v_cache, self.sizes, self.capacity, self.plain, self.extension = k_cache, v_cache, None, 0, False, None
        shape, device = k_cache.shape, k_cache.device
        if len(shape) == 4:
            self.sizes, self.capacity = (k_cache.dtype, shape[0], shape[1], shape[3]), shape[2]
            plain = all(type(x) is torch.Tensor and not x.requires_grad and x.shape == shape and x.device == device for x in (k_cache, v_cache))
            self.plain = plain and v_cache.dtype is k_cache.dtype and k_cache.stride(3) == v_cache.stride(3) == 1
            if self.plain and k_cache.is_cpu:
                self.extension = extension_cache(k_cache, v_cache)

    def __reduce__(self) -> tuple:
        return PreparedCache, (self.k_cache, self.v_cache)


class PreparedDecoderLayer:
    """``decoder_layer`` for many calls on the same weights: the same results, less time per call.

    Calls that are not plain inference over few CPU tokens go through ``decoder_layer``. The weights must not be resized or freed
    while this object is used; it keeps them alive.

    Args:
        weights: CPU tensors, as for ``decoder_layer``.
        num_heads, kv_heads: query and key/value heads. eps, scale: as for ``decoder_layer``.
    Raises: TypeError or ValueError for weights that do not fit together.
    Example:
        >>> layer = qvl_kernels.PreparedDecoderLayer(weights, num_heads=16, kv_heads=8, eps=1e-6, scale=128**-0.5)
        >>> y = layer(x, cos, sin, k_cache, v_cache, past=300)
    """

    ROWS = MIN_ROWS  # fewer than these; more may go to oneDNN

    def __init__(self, weights: DecoderWeights, *, num_heads: int, kv_heads: int, eps: float, scale: float) -> None:
        hidden, head_dim = weights.input_norm.shape[0], weights.q_norm.shape[0]
        self._check(weights.input_norm.new_empty(0, 0, hidden), weights, num_heads, kv_heads, head_dim)
        self.weights, self.num_heads, self.kv_heads, self.eps, self.scale = weights, num_heads, kv_heads, eps, scale
        self.head_dim, self.dtype = head_dim, weights.input_norm.dtype
        self.sizes = (self.dtype, hidden, num_heads, kv_heads, head_dim)  # layers that share them run on the same inputs
        self._extension_layer = None

    def _check(self, x: torch.Tensor, weights: DecoderWeights, num_heads: int, kv_heads: int, head_dim: int) -> None:
        check_weights(x, weights, num_heads, kv_heads, head_dim)

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *,
        past: int, mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """As ``decoder_layer``."""
        return PreparedDecoderLayer.run([self], x, cos, sin, [PreparedCache(k_cache, v_cache)], past=past, mask=mask)[0]

    @staticmethod
    def run(
        layers: Sequence["PreparedDecoderLayer"], x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        caches: Sequence[PreparedCache], *, past: int, mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:  # fmt: skip
        """Layers one after the other, each on the output of the one before, in one call of the extension where that is possible.

        Between two calls of the extension the weights of a layer push what Python looks at out of the processor's caches.

        Args:
            layers: prepared layers. x, cos, sin, past, mask: as for ``decoder_layer``. caches: of each layer.
        Returns:
            The output of every layer, each [B, T, C].
        Raises: as ``decoder_layer``.
        Example:
            >>> caches = [PreparedCache(k1, v1), PreparedCache(k2, v2)]
            >>> *_, y = PreparedDecoderLayer.run([first, second], x, cos, sin, caches, past=300)
        """
        plain = _is_plain(layers, x, cos, sin, caches, past, mask)
        if not plain or not x.is_cpu:
            outs = []
            for layer, cache in zip(layers, caches, strict=True):
                x = (layer.composed if plain else layer.in_ops)(x, cos, sin, cache.k_cache, cache.v_cache, past, mask)
                outs.append(x)
            return outs
        memories = [cache.extension for cache in caches]
        return run_extension_layers([layer.extension_layer() for layer in layers], x, cos, sin, memories, past, mask, layers[0].num_heads)

    def extension_layer(self):
        """The layer as the extension takes it."""
        if self._extension_layer is None:
            self._extension_layer = extension_layer(
                *self.weights.groups(), self.num_heads, self.kv_heads, self.head_dim, self.eps, self.scale
            )
        return self._extension_layer

    def one_call(self, rows: int) -> bool:
        """Whether the extension computes the layer for so many rows in one call."""
        return rows < self.ROWS

    def composed(self, x, cos, sin, k_cache, v_cache, past, mask) -> torch.Tensor:
        """The layer from single ops, of arguments that are known to fit together."""
        return compose_decoder_layer(
            x, *self.weights.groups(), cos, sin, k_cache, v_cache, past, mask, self.num_heads, self.eps, self.scale
        )

    def in_ops(self, x, cos, sin, k_cache, v_cache, past, mask) -> torch.Tensor:
        """The layer of arguments that are not plain; refuses what does not fit together."""
        return decoder_layer(
            x, self.weights, cos, sin, k_cache, v_cache, past=past, mask=mask, num_heads=self.num_heads, eps=self.eps, scale=self.scale
        )


def _is_plain(layers, x, cos, sin, caches, past, mask) -> bool:
    """Whether the extension, or on a GPU the kernels one by one, may be called as things are; whatever is odd, errors included, is left to
    ``decoder_layer``."""
    shape, (dtype, hidden, heads, kv_heads, head_dim) = x.shape, layers[0].sizes
    on_cpu, device = x.is_cpu, x.device
    if len(shape) != 3 or len(layers) != len(caches):
        return False
    if not on_cpu and (not x.is_cuda or head_dim % 2 or unsupported_heads(x, head_dim) is not None):
        return False
    for tensor in (x, cos, sin):
        if type(tensor) is not torch.Tensor or tensor.dtype is not dtype or tensor.device != device or tensor.requires_grad:
            return False
    batch, time, _ = shape
    tables = (1, time, head_dim), (batch, time, head_dim)
    if not (
        shape[2] == hidden
        and x.is_contiguous()
        and cos.shape in tables
        and sin.shape in tables
        and cos.stride()[2] == sin.stride()[2] == 1
        and (mask is None or (mask.dim() == 4 and mask.device == device and mask.dtype in (torch.bool, dtype) and _broadcasts(
            mask.shape, (batch, heads, time, past + time))))
        and dispatch.forced() in (None, "cpp" if on_cpu else "triton")
        and not watched()
        and (on_cpu or gpu.unavailable() is None)
    ):
        return False
    sizes, rows, cached = layers[0].sizes, batch * time, (dtype, batch, kv_heads, head_dim)
    for layer, cache in zip(layers, caches):  # once per layer and token
        if layer.sizes != sizes or on_cpu and not layer.one_call(rows):
            return False
        if cache.sizes != cached or not 0 <= past <= cache.capacity - time:
            return False
        if cache.extension is None if on_cpu else not cache.plain or cache.k_cache.device != device or layer.weights.input_norm.device != device:
            return False
    return True


def _broadcasts(mask: torch.Size, full: tuple[int, int, int, int]) -> bool:
    """A mask [B or 1, H or 1, T or 1, >= keys] over ``full``."""
    return mask[0] in (1, full[0]) and mask[1] in (1, full[1]) and mask[2] in (1, full[2]) and mask[3] >= full[3]
