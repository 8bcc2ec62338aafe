"""A decoder layer with its weights checked once: for decoding, where checks and dispatch would cost as much as small layers."""

import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.ops.attention.cpu import mask_arguments
from qvl_kernels.ops.decoder_layer import DecoderWeights, check_weights, decoder_layer
from qvl_kernels.ops.linear.onednn import MIN_ROWS
from qvl_kernels.ops.linear.weights import extension_weight, out_features

__all__ = ["PreparedDecoderLayer"]


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
        self.head_dim, self._dtype, self._hidden = head_dim, weights.input_norm.dtype, hidden
        self._pointers = None  # of norms and linear layers, as the extension takes them

    def _check(self, x: torch.Tensor, weights: DecoderWeights, num_heads: int, kv_heads: int, head_dim: int) -> None:
        check_weights(x, weights, num_heads, kv_heads, head_dim)

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *,
        past: int, mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """As ``decoder_layer``."""
        if not self._is_plain(x, cos, sin, k_cache, v_cache, past, mask):
            return self._other(x, cos, sin, k_cache, v_cache, past, mask)
        batch, time, hidden = x.shape
        out = torch.empty_like(x)
        kind, pointer, mask_strides = 0, 0, (0, 0, 0, 0)
        if mask is not None:
            kind, pointer, mask_strides = mask_arguments(mask[..., : past + time], (batch, self.num_heads, time, past + time))
        cos_stride, sin_stride = cos.stride(), sin.stride()
        norms, linears, mlp = self._pointers or self._point()
        dispatch.extension().decoder_layer(
            x.data_ptr(), out.data_ptr(), norms, linears, cos.data_ptr(), sin.data_ptr(),
            (cos_stride[0] if cos.shape[0] > 1 else 0, cos_stride[1]), (sin_stride[0] if sin.shape[0] > 1 else 0, sin_stride[1]),
            k_cache.data_ptr(), v_cache.data_ptr(), k_cache.stride()[:3], v_cache.stride()[:3], batch, time, past, hidden,
            self.num_heads, self.kv_heads, self.head_dim, mlp, kind, pointer, mask_strides, self.eps, self.scale,
            DTYPE_CODES[self._dtype],
        )  # fmt: skip
        return out

    def _point(self) -> tuple[list, list, int]:
        w = self.weights
        norms = [norm.data_ptr() for norm in (w.input_norm, w.q_norm, w.k_norm, w.post_norm)]
        biases = (w.q_bias, w.k_bias, w.v_bias, w.o_bias, None, None, None)
        linears = [extension_weight(weight, bias) for weight, bias in zip((w.q, w.k, w.v, w.o, w.gate, w.up, w.down), biases)]
        self._pointers = norms, linears, out_features(w.gate)
        return self._pointers

    def _other(self, x, cos, sin, k_cache, v_cache, past, mask) -> torch.Tensor:
        return decoder_layer(
            x, self.weights, cos, sin, k_cache, v_cache, past=past, mask=mask, num_heads=self.num_heads, eps=self.eps, scale=self.scale
        )

    def _is_plain(self, x, cos, sin, k_cache, v_cache, past, mask) -> bool:
        """Whether the extension may be called as things are; whatever is odd, errors included, is left to ``decoder_layer``."""
        dtype, shape, cache_shape = self._dtype, x.shape, k_cache.shape
        if len(shape) != 3 or shape[0] * shape[1] >= self.ROWS or len(cache_shape) != 4:
            return False
        for tensor in (x, cos, sin, k_cache, v_cache):
            if type(tensor) is not torch.Tensor or tensor.dtype is not dtype or not tensor.is_cpu or tensor.requires_grad:
                return False
        batch, time, hidden = shape
        tables = (1, time, self.head_dim), (batch, time, self.head_dim)
        return (
            hidden == self._hidden
            and x.is_contiguous()
            and cos.shape in tables
            and sin.shape in tables
            and cos.stride()[2] == sin.stride()[2] == 1
            and cache_shape == v_cache.shape
            and (cache_shape[0], cache_shape[1], cache_shape[3]) == (batch, self.kv_heads, self.head_dim)
            and k_cache.stride()[3] == v_cache.stride()[3] == 1
            and 0 <= past <= cache_shape[2] - time
            and (mask is None or (mask.dim() == 4 and mask.is_cpu and mask.dtype in (torch.bool, dtype) and _broadcasts(
                mask.shape, (batch, self.num_heads, time, past + time))))
            and dispatch.forced() in (None, "cpp")
            and not torch._C._len_torch_dispatch_stack()
            and not torch.is_grad_enabled()
        )


def _broadcasts(mask: torch.Size, full: tuple[int, int, int, int]) -> bool:
    """A mask [B or 1, H or 1, T or 1, >= keys] over ``full``."""
    return mask[0] in (1, full[0]) and mask[1] in (1, full[1]) and mask[2] in (1, full[2]) and mask[3] >= full[3]
