from collections.abc import Sequence
from typing import Any

import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.ops.attention.cpu import mask_arguments
from qvl_kernels.ops.decoder_layer.unfused import unfused_decoder_layer
from qvl_kernels.ops.linear.onednn import use_onednn
from qvl_kernels.ops.linear.weights import extension_weight, out_features
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["decoder_layer_cpu", "extension_cache", "extension_layer", "run_extension_layers", "run_to_last"]


def extension_layer(
    norms: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | QuantizedWeight],
    biases: Sequence[torch.Tensor | None],
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    scale: float,
) -> Any:
    """A layer as the extension takes it; the tensors must outlive it. norms: input, q, k, post; weights: q, k, v, o,
    gate, up, down; biases of the first four.
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


def extension_cache(k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
    """Caches [B, Hkv, S_cap, D] as the extension takes them; the tensors must outlive it."""
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
    """The outputs of ``extension_layer`` objects one after the other on an ``extension_cache`` each, in one call. All
    is checked.
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
    """As ``run_extension_layers``, the output of the last layer alone."""
    turns = torch.empty_like(x), torch.empty_like(x)
    _run(layers, x, [turns[i % 2] for i in range(len(layers))], cos, sin, caches, past, mask, num_heads)
    return turns[(len(layers) - 1) % 2]


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
    if use_onednn(x, x.shape[0] * x.shape[1], *weights):
        return unfused_decoder_layer(
            x, norms, weights, biases, cos, sin, k_cache, v_cache, past, mask, num_heads, eps, scale
        )
    layer = extension_layer(norms, weights, biases, num_heads, k_cache.shape[1], k_cache.shape[3], eps, scale)
    return run_extension_layers([layer], x, cos, sin, [extension_cache(k_cache, v_cache)], past, mask, num_heads)[0]
