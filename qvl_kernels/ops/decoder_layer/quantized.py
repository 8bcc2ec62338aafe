"""A decoder layer some of whose weights are quantised; looks like a PreparedDecoderLayer from outside."""

import torch

from qvl_kernels.ops.decoder_layer import DecoderWeights, check_weights
from qvl_kernels.ops.decoder_layer.prepared import PreparedDecoderLayer
from qvl_kernels.ops.linear.weights import stand_in
from qvl_kernels.quant import QuantizedWeight

__all__ = ["QuantizedDecoderLayer"]


class QuantizedDecoderLayer(PreparedDecoderLayer):
    """``decoder_layer`` over DecoderWeights any of whose matrices is a ``quant.QuantizedWeight``. Inference only.

    On the CPU one C++ call; on GPUs, under tracing and where gate and up differ in format, composed of single ops.
    Activations are rounded as ``quantized_linear`` does.

    Args:
        weights: with tensors or QuantizedWeight. num_heads, kv_heads: query and key/value heads. eps, scale: as ``decoder_layer``.
    Raises: TypeError or ValueError for weights that do not fit together.
    """

    def __init__(self, weights: DecoderWeights, **sizes) -> None:
        super().__init__(weights, **sizes)
        self._one_format = _one_format(weights.gate, weights.up)

    def _check(self, x: torch.Tensor, weights: DecoderWeights, num_heads: int, kv_heads: int, head_dim: int) -> None:
        stand_ins = DecoderWeights(*(stand_in("decoder_layer", weight, x) for weight in weights))
        check_weights(x, stand_ins, num_heads, kv_heads, head_dim)

    def one_call(self, rows: int) -> bool:
        return self._one_format

    def in_ops(self, x, cos, sin, k_cache, v_cache, past, mask) -> torch.Tensor:
        if past < 0 or past + x.shape[1] > k_cache.shape[2]:
            raise ValueError(f"decoder_layer: {x.shape[1]} new keys at position {past} do not fit a cache of {k_cache.shape[2]}")
        return self.composed(x, cos, sin, k_cache, v_cache, past, mask)


def _one_format(gate: torch.Tensor | QuantizedWeight, up: torch.Tensor | QuantizedWeight) -> bool:
    """Whether one kernel can read both."""
    if isinstance(gate, QuantizedWeight) and isinstance(up, QuantizedWeight):
        return gate.bits == up.bits and gate.group == up.group
    return isinstance(gate, torch.Tensor) and isinstance(up, torch.Tensor)
