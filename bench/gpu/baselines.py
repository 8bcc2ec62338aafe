"""Baselines of the kernels on a GPU: PyTorch eager and compiled, its attention backends, and installed libraries."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import qvl_kernels
from qvl_kernels.quantization import QuantizedWeight, dequantize

__all__ = [
    "attention_baselines",
    "cross_attention_baselines",
    "decode_attention_baselines",
    "linear_cross_entropy_baselines",
    "plain_baselines",
    "quantized_baselines",
]

Baselines = dict[str, Callable[..., object]]


def _eager(op: str) -> Callable[..., object]:
    function = getattr(qvl_kernels, op)

    def call(**arguments: Any) -> Any:
        with qvl_kernels.use_backend("reference"):
            return function(**arguments)

    return call


@functools.cache
def _liger() -> dict[str, Callable[..., object]]:
    """op -> Liger-Kernel's counterpart with our argument names; empty where it is not installed."""
    try:
        from liger_kernel.transformers import functional as liger
    except ImportError:
        return {}
    return {
        "rms_norm": lambda x, weight: liger.liger_rms_norm(x, weight, 1e-6, 0.0, "llama", False),
        "add_rms_norm": lambda x, residual, weight: liger.liger_fused_add_rms_norm(
            x, residual, weight, 1e-6, 0.0, "llama", False
        ),
        "layer_norm": lambda x, weight, bias: liger.liger_layer_norm(x, weight, bias, 1e-6),
        "swiglu": lambda gate, up: liger.liger_swiglu(gate, up),
        "linear_cross_entropy": lambda hidden, weight, labels: liger.liger_fused_linear_cross_entropy(
            hidden, weight, labels
        ),
    }


def plain_baselines(op: str) -> Baselines:
    """The reference eagerly and compiled, and Liger's kernel if it has one."""
    baselines = {"eager": _eager(op), "compile": torch.compile(_eager(op), dynamic=False)}
    return baselines | ({"liger": _liger()[op]} if op in _liger() else {})


def linear_cross_entropy_baselines() -> Baselines:
    def stock(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy((hidden @ weight.t()).float(), labels)

    return {"eager": stock} | ({"liger": _liger()["linear_cross_entropy"]} if _liger() else {})


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """[B, T, H, D] in and out."""
    if q.dtype == torch.float32:  # the reference: with grouped queries SDPA would materialise all scores
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    out = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=q.shape[2] != k.shape[2], **options
    )
    return out.transpose(1, 2)


def _with_backend(backend: SDPBackend, function: Callable[..., object]) -> Callable[..., object]:
    def call(**arguments: Any) -> Any:
        with sdpa_kernel([backend]):
            return function(**arguments)

    return call


def attention_baselines(*, causal: bool, lengths: tuple[int, int] | None = None) -> Baselines:
    """SDPA as stock calls it, its FLASH and CUDNN backends, and flash-attn. ``lengths``: (sequences, tokens of each) of
    varlen inputs.
    """

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
        if lengths is None:
            return _sdpa(q, k, v, is_causal=causal)
        return _sdpa(*(x.view(*lengths, *x.shape[1:]) for x in (q, k, v)), is_causal=causal).reshape(q.shape)

    baselines = {
        "sdpa": sdpa,
        "flash": _with_backend(SDPBackend.FLASH_ATTENTION, sdpa),
        "cudnn": _with_backend(SDPBackend.CUDNN_ATTENTION, sdpa),
    }
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ImportError:
        return baselines
    if lengths is None:
        baselines["flash-attn"] = lambda q, k, v, **_: flash_attn_func(q, k, v, causal=causal)
    else:
        baselines["flash-attn"] = lambda q, k, v, cu_seqlens, **_: flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, lengths[1], lengths[1], causal=causal
        )
    return baselines


def cross_attention_baselines() -> Baselines:
    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_lens: torch.Tensor) -> torch.Tensor:
        visible = torch.arange(k.shape[1], device=q.device)[None, None, None] < kv_lens[:, None, None, None]
        return _sdpa(q, k, v, attn_mask=visible)

    return {"sdpa": sdpa}


def decode_attention_baselines() -> Baselines:
    def sdpa(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """A decode step over a static KV cache, as stock transformers does it: a mask hides the empty slots."""
        visible = torch.arange(k_cache.shape[2], device=q.device)[None, None, None] < lengths[:, None, None, None]
        out = scaled_dot_product_attention(q.transpose(1, 2), k_cache, v_cache, attn_mask=visible, enable_gqa=True)
        return out.transpose(1, 2)

    return {"sdpa": sdpa}


def quantized_baselines() -> Baselines:
    """The reference, and the matmul with the same weight dequantised to 16 bits beforehand: what a user has without
    quantisation.
    """
    kept: dict[int, torch.Tensor] = {}

    def dequantised(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
        key = id(weight.values)
        if key not in kept:
            kept[key] = dequantize(weight, x.dtype)
        return x @ kept[key].t()

    return {"eager": _eager("quantized_linear"), "dequantised": dequantised}
