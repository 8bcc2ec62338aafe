"""Layer handle of a decoder layer with quantised weights, with the interface of PreparedDecoderLayer."""

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.ops.attention.api import unsupported_heads
from qvl_kernels.ops.decoder_layer.call import NO_BACKWARD, OP, DecoderWeights, check_call
from qvl_kernels.ops.decoder_layer.prepared import PreparedDecoderLayer
from qvl_kernels.ops.decoder_layer.reference import decoder_layer_reference
from qvl_kernels.ops.linear.weights import placeholder, unsupported_scales
from qvl_kernels.quantization import QuantizedWeight, dequantize

__all__ = ["QuantizedDecoderLayer"]


class QuantizedDecoderLayer(PreparedDecoderLayer):
    """``decoder_layer`` over DecoderWeights of which any matrix may be a ``quant.QuantizedWeight``. Inference only.

    On the CPU it is one C++ call; on GPUs, under tracing, if gate and up differ in format, and where PyTorch's kernels
    are faster it is unfused.
    Activations are rounded as ``quantized_linear`` does.

    Args:
        weights: with tensors or QuantizedWeight. num_heads, kv_heads: query and key/value heads. eps, scale: as
            ``decoder_layer``.
    Raises: TypeError or ValueError for weights that do not fit together.
    """

    def __init__(
        self, weights: DecoderWeights, *, num_heads: int, kv_heads: int, eps: float, scale: float | None
    ) -> None:
        super().__init__(weights, num_heads=num_heads, kv_heads=kv_heads, eps=eps, scale=scale)
        self._unsupported = unsupported_scales(*weights)
        self._eligible = self._eligible and self._unsupported is None
        self._one_format = _one_format(weights.gate, weights.up)

    def _shapes(self, weights: DecoderWeights) -> DecoderWeights:
        return DecoderWeights._make(placeholder(OP, weight, weights.input_norm) for weight in weights)

    def _one_call(self, rows: int) -> bool:
        return self._eligible and self._one_format and not self._prefers_pytorch(rows)

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
        past, mask = check_call(x, self._shapes(self.weights), cos, sin, k_cache, v_cache, past, mask, self.num_heads)
        quantised = [weight for weight in self.weights if isinstance(weight, QuantizedWeight)]
        checks.check_no_gradient(OP, NO_BACKWARD, *(weight.scales for weight in quantised))
        if dispatch.choose(OP, x.device, self._unsupported or unsupported_heads(x, self.head_dim)) == "reference":
            weights = DecoderWeights._make(
                dequantize(w, x.dtype) if isinstance(w, QuantizedWeight) else w for w in self.weights
            )
            return decoder_layer_reference(
                x, weights, cos, sin, k_cache, v_cache, past, mask, self.num_heads, self.eps, self.scale
            )
        return self._run_unfused(x, cos, sin, k_cache, v_cache, past, mask)


def _one_format(gate: torch.Tensor | QuantizedWeight, up: torch.Tensor | QuantizedWeight) -> bool:
    """Whether gate and up have one format, so that the fused SwiGLU can read both."""
    if isinstance(gate, QuantizedWeight) and isinstance(up, QuantizedWeight):
        return gate.bits == up.bits and gate.group == up.group
    return isinstance(gate, torch.Tensor) and isinstance(up, torch.Tensor)
