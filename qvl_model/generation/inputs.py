"""Shared by decode steps on CPUs and GPUs: which layers they can run, and the inputs of the first layer."""

from torch import Tensor, nn

from qvl_model.modules.decoder_layer import plain_fused_layer
from qvl_model.modules.fast_path import kernels_take, masks_as_stock
from qvl_model.quantization.modules import PackedEmbedding
from qvl_model.qvl.text import QVLTextModel

__all__ = ["body_why_not", "cache_indices", "token_embeddings", "token_inputs"]


def body_why_not(body: nn.Module) -> str | None:
    """Why the layers of a language model are not eligible for fused calls as they are now, or None."""
    norm = getattr(body.norm, "weight", None)
    if norm is None or not kernels_take(norm):
        return "weights or autocast are not what the kernels take"
    weight = (
        body.embed_tokens._parameters.get("weight")
        if type(body.embed_tokens) in (nn.Embedding, PackedEmbedding)
        else None
    )
    if weight is None or weight.dtype is not norm.dtype:
        return "the embedding is not eligible for the fast path"
    if not masks_as_stock(body.config):
        return "another function makes attention masks"
    if len(body.layers) == 0:
        return "there are no decoder layers"
    for index, layer in enumerate(body.layers):
        if plain_fused_layer(layer, norm.dtype) is None:
            return f"decoder layer {index} is not eligible for the fast path"
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
