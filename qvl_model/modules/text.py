"""The text decoder: one fused call per layer at inference, op by op with gradients, stock code for the rest."""

import torch
from torch import Tensor
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

import qvl_kernels
from qvl_model import cache
from qvl_model.modules.linear import Linear
from qvl_model.modules.plain import is_plain, kernels_take, no_global_hooks, only_capture_hooks

__all__ = ["Qwen3VLTextAttention", "Qwen3VLTextDecoderLayer", "Qwen3VLTextMLP", "Qwen3VLTextRMSNorm"]

# Arguments of attention functions that change what attention computes; stock code serves them.
_SPECIAL_ARGUMENTS = (
    "is_causal", "position_bias", "cache", "softcap", "s_aux", "sliding_window", "block_table", "head_mask",
    "cu_seq_lens_q", "cu_seq_lens_k",
)  # fmt: skip
_SILU = type(stock.ACT2FN["silu"])


def _has_special_arguments(kwargs: dict) -> bool:
    for name in kwargs:
        if name in _SPECIAL_ARGUMENTS and kwargs[name] is not None:
            return True
    return False


class Qwen3VLTextRMSNorm(stock.Qwen3VLTextRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if kernels_take(hidden_states, self.weight):
            return qvl_kernels.rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
        return super().forward(hidden_states)


class Qwen3VLTextMLP(stock.Qwen3VLTextMLP):
    def forward(self, x: Tensor) -> Tensor:
        if not (is_plain(self.act_fn, _SILU) and no_global_hooks()):
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if kernels_take(gate, up):
            return self.down_proj(qvl_kernels.swiglu(gate, up))
        return self.down_proj(self.act_fn(gate) * up)


class Qwen3VLTextAttention(stock.Qwen3VLTextAttention):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.attention_dropout if self.training else 0.0
        if (
            self.config._attn_implementation != "sdpa"
            or dropout > 0.0
            or not self.is_causal
            or _has_special_arguments(kwargs)
            or not (attention_mask is None or isinstance(attention_mask, Tensor))
            or not (is_plain(self.q_norm, Qwen3VLTextRMSNorm) and is_plain(self.k_norm, Qwen3VLTextRMSNorm))
            or self.q_norm.variance_epsilon != self.k_norm.variance_epsilon
            or not no_global_hooks()
            or not _tables_fit(position_embeddings, hidden_states)
        ):
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape)
        k = self.k_proj(hidden_states).view(shape)
        v = self.v_proj(hidden_states).view(shape)
        cos, sin = position_embeddings
        q_weight, k_weight = self.q_norm.weight, self.k_norm.weight
        if kernels_take(q, k, v, cos, sin, q_weight, k_weight):
            q, k = qvl_kernels.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=self.q_norm.variance_epsilon)
        else:
            q, k = stock.apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), cos, sin, unsqueeze_dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        queries, keys = q.shape[2], k.shape[2]
        # Without a mask sdpa is causal from the first key on; ours from the last. They agree for equal lengths.
        if kernels_take(q, k, v) and (attention_mask is not None or queries in (1, keys)) and _mask_fits(attention_mask, q, k):
            out = qvl_kernels.attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                causal=attention_mask is None and queries > 1,
                mask=attention_mask,
                scale=self.scaling,
            )
        else:
            attend = stock.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", stock.eager_attention_forward)
            out, _ = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(out), None


def _tables_fit(tables: tuple[Tensor, Tensor], x: Tensor) -> bool:
    """cos and sin of exactly the positions of x [B, T, C]; stock code broadcasts whatever else it gets."""
    shape = tables[0].shape
    return len(shape) == 3 and shape[1] == x.shape[1] and shape[0] in (1, x.shape[0])


def _mask_fits(mask: Tensor | None, q: Tensor, k: Tensor) -> bool:
    """A bool mask, or an additive one of q's dtype, of exactly these queries and keys. q, k: [B, H, T, D]."""
    return mask is None or (
        mask.dtype in (torch.bool, q.dtype)
        and mask.dim() == 4
        and mask.shape[0] in (1, q.shape[0])
        and mask.shape[1] in (1, q.shape[1])
        and mask.shape[2] in (1, q.shape[2])
        and mask.shape[3] == k.shape[2]
    )


class Qwen3VLTextDecoderLayer(stock.Qwen3VLTextDecoderLayer):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = False,
        **kwargs,
    ) -> Tensor:
        weights = self._fused_weights(hidden_states, position_embeddings, attention_mask, kwargs)
        if weights is not None:
            attention = self.self_attn
            batch, queries, _ = hidden_states.shape
            store = cache.open_store(
                past_key_values, attention.layer_idx, hidden_states, weights.k.shape[0] // attention.head_dim, attention.head_dim
            )
            if store is not None and _causal_rule_holds(attention_mask, queries, store):
                out = qvl_kernels.decoder_layer(
                    hidden_states,
                    weights,
                    *position_embeddings,
                    store.keys,
                    store.values,
                    past=store.past,
                    mask=attention_mask,
                    num_heads=attention.config.num_attention_heads,
                    eps=self.input_layernorm.variance_epsilon,
                    scale=attention.scaling,
                )
                store.commit(queries)
                return out
        return super().forward(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _fused_weights(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], mask: Tensor | None, kwargs: dict
    ) -> qvl_kernels.DecoderWeights | None:
        """The layer's tensors if one fused call computes what the modules would, else None."""
        # Runs once per layer and token: plain loops and dictionary look-ups, no generators and no __getattr__.
        children = self._modules
        attention, mlp = children["self_attn"], children["mlp"]
        implementation = attention.config._attn_implementation
        if (
            torch.compiler.is_compiling()
            or type(attention) is not Qwen3VLTextAttention
            or "forward" in attention.__dict__
            or not (only_capture_hooks(attention) if implementation == "sdpa" else is_plain(attention, Qwen3VLTextAttention))
            or implementation not in ("sdpa", "eager")
            or (self.training and attention.attention_dropout > 0.0)
            or not attention.is_causal
            or not is_plain(mlp, Qwen3VLTextMLP)
            or not no_global_hooks()
            or not hidden_states.is_contiguous()
            or hidden_states.dim() != 3
            or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype in (torch.bool, hidden_states.dtype)))
            or _has_special_arguments(kwargs)
            or not _tables_fit(position_embeddings, hidden_states)
        ):
            return None
        projections, feed_forward = attention._modules, mlp._modules
        if not is_plain(feed_forward["act_fn"], _SILU):
            return None
        norms = (children["input_layernorm"], projections["q_norm"], projections["k_norm"], children["post_attention_layernorm"])
        eps = norms[0].variance_epsilon
        for norm in norms:
            if not is_plain(norm, Qwen3VLTextRMSNorm) or norm.variance_epsilon != eps:
                return None
        linears = (
            projections["q_proj"], projections["k_proj"], projections["v_proj"], projections["o_proj"],
            feed_forward["gate_proj"], feed_forward["up_proj"], feed_forward["down_proj"],
        )  # fmt: skip
        for linear in linears:
            if not is_plain(linear, Linear):
                return None
        input_norm, q_norm, k_norm, post_norm = [norm._parameters["weight"] for norm in norms]
        q, k, v, o, gate, up, down = [linear._parameters["weight"] for linear in linears]
        q_bias, k_bias, v_bias, o_bias, *mlp_biases = [linear._parameters["bias"] for linear in linears]
        weights = qvl_kernels.DecoderWeights(
            input_norm, q, k, v, q_norm, k_norm, o, post_norm, gate, up, down, q_bias, k_bias, v_bias, o_bias
        )
        if mlp_biases != [None, None, None] or not kernels_take(hidden_states, *weights, *position_embeddings):
            return None
        if torch.is_grad_enabled():
            for tensor in (hidden_states, *weights):
                if tensor is not None and tensor.requires_grad:
                    return None
        return weights


def _causal_rule_holds(mask: Tensor | None, queries: int, store: "cache.Store") -> bool:
    """Whether no mask, or this mask, means to sdpa what it means to ``decoder_layer`` with this cache."""
    keys = store.past + queries
    if mask is None:
        # sdpa sees the whole of what the cache returns, causal from the first key on.
        return (queries == 1 or store.past == 0) and (queries > 1 or store.visible_capacity == keys)
    return mask.shape[3] >= keys
