"""The language decoder: stock Qwen3-VL layers, some with gated cross-attention to visual tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from qvl_model.compat import CACHE, takes_cache
from qvl_model.qvl.base import QVLPreTrainedModel, attend, eager, eager_config, key_mask, rotary_angles
from qvl_model.qvl.cache import add_visual_layer, visual_layer
from qvl_model.qvl.configuration import QVLConfig
from qvl_model.qvl.inputs import check_keywords, check_text

__all__ = ["QVLCrossAttention", "QVLDecoderLayer", "QVLFusion", "QVLTextModel", "Visual"]


class Visual(NamedTuple):
    """Visual tokens of a batch of samples."""

    tokens: Tensor  # [B, S, P]
    lengths: Tensor | None  # int64 [B]: valid tokens of each sample, which come first; None if all have S
    repeats: int = 1  # consecutive rows of text that each sample serves (beams)


class QVLCrossAttention(nn.Module):
    """Text attends to visual tokens; heads are normalised as in the decoder's own attention, without positions."""

    def __init__(self, config: QVLConfig) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.language_projection_dim // heads
        self.num_key_value_groups = heads // kv_heads
        self.scaling, self.is_causal = self.head_dim**-0.5, False
        self.attention_dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.vision_projection_dim, kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.vision_projection_dim, kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(
            heads * self.head_dim, config.hidden_size, bias=False
        )  # no bias: a sample without images must add zero
        self.q_norm = stock.Qwen3VLTextRMSNorm(self.head_dim, eps=config.layer_norm_eps)
        self.k_norm = stock.Qwen3VLTextRMSNorm(self.head_dim, eps=config.layer_norm_eps)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, S, D] of visual tokens [B, S, P]."""
        shape = (*tokens.shape[:2], -1, self.head_dim)
        keys = self.k_norm(self.k_proj(tokens).view(shape))
        return keys.transpose(1, 2), self.v_proj(tokens).view(shape).transpose(1, 2)

    def forward(
        self, hidden_states: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, C] -> ([B, T, C], weights [B, H, T, S] if eager); 0 for samples whose length is 0."""
        q = self.q_norm(self.q_proj(hidden_states).view(*hidden_states.shape[:2], -1, self.head_dim))
        out, weights = self.read(q, keys, values, lengths)
        return self.o_proj(out.reshape(*hidden_states.shape[:2], -1)), weights

    def read(self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """([B, T, H, D], weights) from q [B, T, H, D], keys and values [B, Hkv, S, D]."""
        mask = key_mask(lengths, keys.shape[2], q.dtype)
        out, weights = attend(self, q.transpose(1, 2), keys, values, mask, self.attention_dropout)
        if lengths is not None:
            blind = (lengths == 0)[:, None, None, None]
            out = out.masked_fill(blind, 0)
            weights = None if weights is None else weights.masked_fill(blind, 0)
        return out, weights


class QVLFusion(nn.Module):
    """x + tanh(gate) * cross_attention(norm(x)), before a decoder layer; x without images."""

    def __init__(self, config: QVLConfig, index: int) -> None:
        super().__init__()
        self.layer_idx, self._text_layers = index, config.num_hidden_layers
        self.norm = stock.Qwen3VLTextRMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = QVLCrossAttention(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.gate = nn.Parameter(torch.empty(1))  # one dimension: FSDP2 takes no scalars

    def memory(self, visual: Visual | None, cache: Cache | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys, values and lengths: of new visual tokens, which also go into the cache, or from the cache; None without
        images.
        """
        if visual is None:
            layer = visual_layer(cache, self.layer_idx, self._text_layers)
            return (layer.keys, layer.values, layer.lengths) if layer is not None and layer.is_initialized else None
        keys, values = self.attn.keys_values(visual.tokens)
        lengths = visual.lengths
        if visual.repeats > 1:
            keys, values = keys.repeat_interleave(visual.repeats, 0), values.repeat_interleave(visual.repeats, 0)
            lengths = None if lengths is None else lengths.repeat_interleave(visual.repeats)
        if cache is not None:
            add_visual_layer(cache, self.layer_idx, self._text_layers).update(keys, values, lengths)
        return keys, values, lengths

    def forward(
        self,
        hidden_states: Tensor,
        visual: Visual | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> Tensor:
        memory = self.memory(visual, cache)
        if memory is None:
            return hidden_states
        attention = eager(self.attn) if output_attentions else self.attn
        out, weights = attention(self.norm(hidden_states), *memory)
        if output_attentions:
            _check_recorded(weights, f"cross-attention {self.layer_idx}")
        return hidden_states + self.gate.tanh() * self.dropout(out)


class QVLDecoderLayer(stock.Qwen3VLTextDecoderLayer):
    """The stock decoder layer with dropout, and with cross-attention before it where the config names the layer."""

    def __init__(self, config: QVLConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.hidden_act == "swish":  # two names of one function; the stock modules use this one
            self.mlp.act_fn = ACT2FN["silu"]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        fused = config.cross_attention_layers
        self.fusion = QVLFusion(config, fused.index(layer_idx)) if layer_idx in fused else None

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        visual_tokens: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        visual: Visual | None = None,
        fuse: bool = True,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """The decoder layer.

        Args:
            visual_tokens: tokens of ``visual``, passed separately since reentrant checkpointing tracks tensor arguments
                only.
            fuse: whether cross-attention is still to be computed.
            output_attentions: use the eager formula, which returns weights and needs an additive mask.
        """
        if fuse:
            hidden_states = self.fuse(hidden_states, visual_tokens, visual, cache, output_attentions)
        residual = hidden_states
        attention = eager(self.self_attn) if output_attentions else self.self_attn
        hidden_states, weights = attention(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **{CACHE: cache},
            **kwargs,
        )
        if output_attentions:
            _check_recorded(weights, f"the self-attention of layer {self.self_attn.layer_idx}")
        hidden_states = residual + self.dropout(hidden_states)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))

    def fuse(
        self,
        hidden_states: Tensor,
        tokens: Tensor | None,
        visual: Visual | None,
        cache: Cache | None,
        output_attentions: bool,
    ) -> Tensor:
        if self.fusion is None:
            return hidden_states
        return self.fusion(
            hidden_states, None if visual is None else visual._replace(tokens=tokens), cache, output_attentions
        )


def _check_recorded(weights: Tensor | None, name: str) -> None:
    if weights is None:  # a forward that was replaced on the instance calls the original module
        raise RuntimeError(
            f"QVL: output_attentions=True, but the forward of {name} was replaced and returns no weights; "
            'load the model with attn_implementation="eager"'
        )


class QVLTextModel(QVLPreTrainedModel):
    """Tokens (and visual tokens) -> hidden states."""

    input_modalities = ("text",)
    _can_record_outputs = {
        "hidden_states": QVLDecoderLayer,
        "attentions": OutputRecorder(stock.Qwen3VLTextAttention, index=1),
        "cross_attentions": OutputRecorder(QVLCrossAttention, index=1),
    }

    def __init__(self, config: QVLConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(QVLDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = stock.Qwen3VLTextRMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @takes_cache
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        visual: Visual | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        check_keywords(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("QVL: give either input_ids or inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if token_type_ids is None:
            token_type_ids = self._token_types(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        check_text(self.config, inputs_embeds, attention_mask, position_ids, token_type_ids, cache)
        hidden_states = self._with_types(inputs_embeds, token_type_ids)
        if position_ids is None:
            position_ids = _positions(attention_mask, cache, inputs_embeds)
        attentions = bool(kwargs.pop("output_attentions", self.config.output_attentions))
        mask = create_causal_mask(
            config=eager_config(self.config) if attentions else self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE: cache},
            position_ids=position_ids,
        )
        if (
            attentions and mask is not None and mask.dtype == torch.bool
        ):  # a mask that came with four dimensions is left as it is
            mask = torch.zeros(mask.shape, dtype=hidden_states.dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(hidden_states.dtype).min
            )
        cos_sin = self.rotary_emb(hidden_states, position_ids)
        tokens = None if visual is None else visual.tokens
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                tokens,
                position_embeddings=cos_sin,
                attention_mask=mask,
                position_ids=position_ids,
                **{CACHE: cache},
                use_cache=use_cache,
                visual=visual,
                output_attentions=attentions,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Hidden states [B, T, C], the input of the first layer, of input_ids [B, T]."""
        return self._with_types(self.embed_tokens(input_ids), self._token_types(input_ids, None))

    def _with_types(self, embeddings: Tensor, token_types: Tensor) -> Tensor:
        return self.dropout(embeddings + self.embed_token_types(token_types))

    def rotary_emb(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, T, D] of positions [B or 1, T], dtype of x."""
        angles = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def _token_types(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """1 for image tokens, else 0."""
        if input_ids is None:
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        image = self.config.image_token_id
        return torch.zeros_like(input_ids) if image is None else (input_ids == image).long()


def _positions(attention_mask: Tensor | None, cache: Cache | None, embeddings: Tensor) -> Tensor:
    """Positions [B or 1, T] of the last T tokens; padding is not counted."""
    queries = embeddings.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -queries:]
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(queries, device=embeddings.device) + past)[None]
