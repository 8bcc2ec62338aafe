"""decoder_layer on the CPU: C++ handles of layers and KV caches, and calls on them."""

from collections.abc import Sequence
from typing import Any

import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.ops.attention import selection as attention_selection
from qvl_kernels.ops.attention.extension import mask_arguments
from qvl_kernels.ops.decoder_layer.unfused import unfused_decoder_layer
from qvl_kernels.ops.linear import selection as linear_selection
from qvl_kernels.ops.linear.weights import extension_weight, out_features
from qvl_kernels.quantization import QuantizedWeight

__all__ = [
    "attends_by_pytorch",
    "cache_handle",
    "decoder_layer_cpu",
    "layer_handle",
    "run_extension_layers",
    "run_to_last",
]


def layer_handle(
    norms: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | QuantizedWeight],
    biases: Sequence[torch.Tensor | None],
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    scale: float,
) -> Any:
    """The extension's handle of a layer; the tensors must outlive it.

    norms: input, q, k, post. weights: q, k, v, o, gate, up, down. biases: of the first four weights.
    """
    linears = [extension_weight(weight, bias) for weight, bias in zip(weights, (*biases, None, None, None))]
    return dispatch.extension().DecoderLayer(
        [norm.data_ptr() for norm in norms],
        linears,
        norms[0].shape[0],
        num_heads,
        kv_heads,
        head_dim,
        out_features(weights[4]),
        eps,
        scale,
        DTYPE_CODES[norms[0].dtype],
    )


def cache_handle(k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
    """The extension's handle of a KV cache [B, Hkv, S_cap, D]; the tensors must outlive it."""
    return dispatch.extension().LayerCache(
        k_cache.data_ptr(), v_cache.data_ptr(), k_cache.stride()[:3], v_cache.stride()[:3]
    )


def run_extension_layers(
    layers: Sequence,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    caches: Sequence,
    past: int,
    mask: torch.Tensor | None,
    num_heads: int,
) -> list[torch.Tensor]:
    """Outputs of all layers (``layer_handle``), run one after the other on a cache each (``cache_handle``) in one call.

    The arguments are not checked.
    """
    outs = [torch.empty_like(x) for _ in layers]
    _run(layers, x, outs, cos, sin, caches, past, mask, num_heads)
    return outs


def run_to_last(
    layers: Sequence,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    caches: Sequence,
    past: int,
    mask: torch.Tensor | None,
    num_heads: int,
) -> torch.Tensor:
    """As ``run_extension_layers``, but returns the output of the last layer only."""
    buffers = torch.empty_like(x), torch.empty_like(x)
    _run(layers, x, [buffers[i % 2] for i in range(len(layers))], cos, sin, caches, past, mask, num_heads)
    return buffers[(len(layers) - 1) % 2]


def _run(
    layers: Sequence,
    x: torch.Tensor,
    outs: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    caches: Sequence,
    past: int,
    mask: torch.Tensor | None,
    num_heads: int,
) -> None:
    batch, time, _ = x.shape
    kind, pointer, mask_strides = mask_arguments(
        mask if mask is None else mask[..., : past + time], (batch, num_heads, time, past + time)
    )
    cos_stride, sin_stride = cos.stride(), sin.stride()
    dispatch.extension().decoder_layers(
        layers,
        x.data_ptr(),
        [out.data_ptr() for out in outs],
        cos.data_ptr(),
        sin.data_ptr(),
        (cos_stride[0] if cos.shape[0] > 1 else 0, cos_stride[1]),
        (sin_stride[0] if sin.shape[0] > 1 else 0, sin_stride[1]),
        caches,
        batch,
        time,
        past,
        kind,
        pointer,
        mask_strides,
    )


def attends_by_pytorch(x: torch.Tensor, head_dim: int, past: int, mask: torch.Tensor | None) -> bool:
    """Whether PyTorch's attention is faster for the tokens x [B, T, C]."""
    time = x.shape[1]
    return mask is None and attention_selection.use_pytorch(x.dtype, time, past + time, head_dim, causal=True)


def decoder_layer_cpu(
    x: torch.Tensor,
    norms: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    past: int,
    mask: torch.Tensor | None,
    num_heads: int,
    eps: float,
    scale: float,
) -> torch.Tensor:
    if linear_selection.use_pytorch(x.dtype, x.shape[0] * x.shape[1], *weights) or attends_by_pytorch(
        x, k_cache.shape[3], past, mask
    ):
        return unfused_decoder_layer(
            x, norms, weights, biases, cos, sin, k_cache, v_cache, past, mask, num_heads, eps, scale
        )
    layer = layer_handle(norms, weights, biases, num_heads, k_cache.shape[1], k_cache.shape[3], eps, scale)
    return run_extension_layers([layer], x, cos, sin, [cache_handle(k_cache, v_cache)], past, mask, num_heads)[0]
