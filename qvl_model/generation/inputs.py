"""Shared by decode steps on CPUs and GPUs: which layers they can run, and the inputs of the first layer."""

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from qvl_model.modules.decoder_layer import fused_layer_of
from qvl_model.modules.fast_path import kernels_take, only_capture_hooks, runs_library_code
from qvl_model.quantization.modules import PackedEmbedding
from qvl_model.qvl.text import QVLTextModel

__all__ = ["body_why_not", "cache_indices", "token_embeddings", "token_inputs"]


def body_why_not(body: nn.Module) -> str | None:
    """Why the layers of a language model are not eligible for fused calls as they are now, or None."""
    if not kernels_take(body.norm.weight):
        return "weights or autocast are not what the kernels take"
    weight = (
        body.embed_tokens._parameters.get("weight")
        if type(body.embed_tokens) in (nn.Embedding, PackedEmbedding)
        else None
    )
    if weight is None or weight.dtype is not body.norm.weight.dtype:
        return "the embedding is not plain"
    mask_function = ALL_MASK_ATTENTION_FUNCTIONS.get(body.config._attn_implementation)
    if mask_function is not None and not mask_function.__module__.startswith("transformers."):
        return "another function makes attention masks"
    for index, layer in enumerate(body.layers):
        hooked = (
            layer._forward_pre_hooks
            or not only_capture_hooks(layer, "hidden_states")
            or not runs_library_code(layer, "forward", "__call__")
        )
        fused_layer = None if hooked else fused_layer_of(layer)
        if (
            fused_layer is None
            or not layer.is_deterministic()
            or fused_layer.handle.dtype is not body.norm.weight.dtype
        ):
            return f"decoder layer {index} is not plain"
    if len(set(cache_indices(body))) < len(body.layers):
        return "decoder layers share a place in the cache"
    return None


def cache_indices(body: nn.Module) -> list[int]:
    """The index in the KV cache of each layer's keys and values."""
    return [layer.self_attn.layer_idx for layer in body.layers]


def token_inputs(body: nn.Module, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, 1, C], cos and sin [B, 1, D] of ``tokens``, int64 [B, 1].

    Args:
        positions: int64 [3, B, 1]; QVL: [B, 1].
    """
    hidden = token_embeddings(body, tokens)
    return hidden, *body.rotary_emb(hidden, positions)


def token_embeddings(body: nn.Module, tokens: Tensor) -> Tensor:
    """Hidden states [B, 1, C] of ``tokens`` int64 [B, 1]."""
    hidden = body.embed_text(tokens) if isinstance(body, QVLTextModel) else body.embed_tokens(tokens)
    return hidden.contiguous()
