"""A decoder layer some of whose weights are quantised, composed of single ops; looks like a PreparedDecoderLayer from outside."""

import torch

from qvl_kernels.ops.decoder_layer import DecoderWeights
from qvl_kernels.ops.decoder_layer.compose import compose_decoder_layer

__all__ = ["QuantizedDecoderLayer"]


class QuantizedDecoderLayer:
    """``decoder_layer`` over DecoderWeights any of whose matrices is a ``quant.QuantizedWeight``. Inference only.

    Args:
        weights: with tensors or QuantizedWeight. num_heads, kv_heads: query and key/value heads. eps, scale: as ``decoder_layer``.
    """

    def __init__(self, weights: DecoderWeights, *, num_heads: int, kv_heads: int, eps: float, scale: float) -> None:
        self.weights, self.num_heads, self.kv_heads, self.eps, self.scale = weights, num_heads, kv_heads, eps, scale
        self.head_dim = weights.q_norm.shape[0]

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *,
        past: int, mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """As ``decoder_layer``."""
        if past < 0 or past + x.shape[1] > k_cache.shape[2]:
            raise ValueError(f"decoder_layer: {x.shape[1]} new keys at position {past} do not fit a cache of {k_cache.shape[2]}")
        w = self.weights
        return compose_decoder_layer(
            x, (w.input_norm, w.q_norm, w.k_norm, w.post_norm), (w.q, w.k, w.v, w.o, w.gate, w.up, w.down),
            (w.q_bias, w.k_bias, w.v_bias, w.o_bias), cos, sin, k_cache, v_cache, past, mask, self.num_heads, self.eps, self.scale,
        )  # fmt: skip
