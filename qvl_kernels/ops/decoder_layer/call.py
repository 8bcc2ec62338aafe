"""The weights of a decoder layer, the checks of its arguments and the call, which public functions share."""

from typing import Any, NamedTuple

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import needs_dispatcher
from qvl_kernels.ops.attention.api import check_mask, unsupported_heads
from qvl_kernels.ops.decoder_layer.caches import check_apart, check_caches
from qvl_kernels.ops.decoder_layer.op import decoder_layer_op
from qvl_kernels.ops.decoder_layer.reference import decoder_layer_reference
from qvl_kernels.ops.decoder_layer.unfused import unfused_decoder_layer
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["NO_BACKWARD", "OP", "DecoderWeights", "check_call", "check_type", "check_weights", "run_decoder_layer"]

OP = "decoder_layer"
NO_BACKWARD = "has no backward; call it under torch.no_grad(), or compose the single ops to train"


class DecoderWeights(NamedTuple):
    """Weights of one decoder layer, as ``nn.Linear`` and norms store them. C hidden size, F MLP width, D head_dim."""

    input_norm: torch.Tensor  # [C]
    q: torch.Tensor | QuantizedWeight  # [H * D, C]
    k: torch.Tensor | QuantizedWeight  # [Hkv * D, C]
    v: torch.Tensor | QuantizedWeight  # [Hkv * D, C]
    q_norm: torch.Tensor  # [D]
    k_norm: torch.Tensor  # [D]
    o: torch.Tensor | QuantizedWeight  # [C, H * D]
    post_norm: torch.Tensor  # [C]
    gate: torch.Tensor | QuantizedWeight  # [F, C]
    up: torch.Tensor | QuantizedWeight  # [F, C]
    down: torch.Tensor | QuantizedWeight  # [C, F]
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None

    def groups(self) -> tuple[tuple, tuple, tuple]:
        """(norms, weights, biases), in the order of the kernels' arguments."""
        return (
            (self.input_norm, self.q_norm, self.k_norm, self.post_norm),
            (self.q, self.k, self.v, self.o, self.gate, self.up, self.down),
            (self.q_bias, self.k_bias, self.v_bias, self.o_bias),
        )


def check_weights(x: torch.Tensor, w: Any, num_heads: int, kv_heads: int, head_dim: int) -> None:
    """Checks weights against x [B, T, C]; each quantised weight is represented by a placeholder of its shape."""
    if num_heads % kv_heads:
        raise ValueError(f"{OP}: num_heads {num_heads} must be a multiple of the cache's {kv_heads} key/value heads")
    for name, weight in zip(DecoderWeights._fields, w):
        if not isinstance(weight, torch.Tensor) and (weight is not None or not name.endswith("_bias")):
            raise TypeError(f"{OP}: {name} must be a torch.Tensor, got {type(weight).__name__}")
    hidden, width, kv_width, mlp = (
        x.shape[2],
        num_heads * head_dim,
        kv_heads * head_dim,
        w.gate.shape[:1].numel(),  # its number of dimensions is checked below
    )
    expected = (
        (hidden,),
        (width, hidden),
        (kv_width, hidden),
        (kv_width, hidden),
        (head_dim,),
        (head_dim,),
        (hidden, width),
        (hidden,),
        (mlp, hidden),
        (mlp, hidden),
        (hidden, mlp),
        (width,),
        (kv_width,),
        (kv_width,),
        (hidden,),
    )
    dtype, device = x.dtype, x.device
    for name, weight, shape in zip(DecoderWeights._fields, w, expected):
        if weight is None:
            continue
        if weight.shape != shape:
            raise ValueError(f"{OP}: {name} must have shape {shape}, got {tuple(weight.shape)}")
        if weight.dtype is not dtype or weight.device != device:
            raise TypeError(
                f"{OP}: {name} is {weight.dtype} on {weight.device}, x is {dtype} on {device}; both must agree"
            )
        checks.check_memory(OP, name, weight)


def check_type(weights: object) -> None:
    if not isinstance(weights, DecoderWeights):
        raise TypeError(
            f"{OP}: weights must be DecoderWeights, got {type(weights).__name__}; give DecoderWeights(*weights)"
        )


def check_call(
    x: torch.Tensor,
    weights: DecoderWeights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    past: int,
    mask: torch.Tensor | None,
    num_heads: int,
) -> tuple[int, torch.Tensor | None]:
    """Checks all arguments (weights as for ``check_weights``); returns ``past`` and the mask up to past + T."""
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        checks.check_tensor(OP, name, tensor, 3)
    if not x.is_contiguous():
        raise ValueError(f"{OP}: x must be contiguous [B, T, C], got shape {tuple(x.shape)}, strides {x.stride()}")
    check_caches(OP, k_cache, v_cache)
    batch, time, _ = x.shape
    _, kv_heads, capacity, head_dim = k_cache.shape
    if k_cache.shape[0] != batch:
        raise ValueError(f"{OP}: caches must have the batch size of x, {batch}, got shape {tuple(k_cache.shape)}")
    past = checks.check_int(OP, "past", past, -(2**63))
    if past < 0 or past + time > capacity:
        raise ValueError(
            f"{OP}: {time} new keys at position {past} do not fit a cache of {capacity}; allocate a larger one"
        )
    check_weights(x, weights, checks.check_int(OP, "num_heads", num_heads, 1), kv_heads, head_dim)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape[1:] != (time, head_dim) or table.shape[0] != 1 and table.shape[0] != batch:
            raise ValueError(
                f"{OP}: {name} must have shape [{batch} or 1, {time}, {head_dim}], got {tuple(table.shape)}"
            )
    checks.check_same(OP, x=x, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
    checks.check_last_contiguous(OP, cos=cos, sin=sin)
    if mask is not None:
        checks.check_kind(OP, "mask", mask)
        if mask.dim() > 0:
            mask = mask[..., : past + time]
        check_mask(OP, mask, x, (batch, num_heads, time, past + time))
    check_apart(OP, k_cache, v_cache, x=x, cos=cos, sin=sin, mask=mask)
    checks.check_no_gradient(OP, NO_BACKWARD, x, cos, sin, mask, *weights)
    return past, mask


def run_decoder_layer(
    x: torch.Tensor,
    weights: DecoderWeights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    past: int,
    mask: torch.Tensor | None,
    num_heads: int,
    eps: float,
    scale: float | None,
) -> torch.Tensor:
    """``decoder_layer``: checks the arguments, chooses the backend and runs it."""
    check_type(weights)
    past, mask = check_call(x, weights, cos, sin, k_cache, v_cache, past, mask, num_heads)
    eps, scale = checks.check_eps(OP, eps), checks.check_scale(OP, scale, k_cache.shape[3])
    w = weights
    backend = dispatch.choose(OP, x.device, unsupported_heads(x, k_cache.shape[3]))
    if backend == "reference":
        return decoder_layer_reference(x, w, cos, sin, k_cache, v_cache, past, mask, num_heads, eps, scale)
    function = decoder_layer_op
    if backend == "triton" and not needs_dispatcher():
        # The dispatcher takes the host longer than the device takes for small kernels.
        function = unfused_decoder_layer
    return function(x, *w.groups(), cos, sin, k_cache, v_cache, past, mask, num_heads, eps, scale)
