"""The text decoder: one fused call per layer at inference, op by op with gradients, stock code for the rest."""

import weakref

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

import qvl_kernels
from qvl_kernels.quant import QuantizedWeight
from qvl_model import cache
from qvl_model.modules.linear import Linear
from qvl_model.modules.packed import PackedLinear
from qvl_model.modules.parts import in_parts, splits
from qvl_model.modules.plain import autocast_dtype, is_plain, kernels_take, no_global_hooks, only_capture_hooks

__all__ = ["Qwen3VLTextAttention", "Qwen3VLTextDecoderLayer", "Qwen3VLTextMLP", "Qwen3VLTextRMSNorm", "plan_of"]

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
        if kernels_take(hidden_states, self.weight, cast=False):
            return qvl_kernels.rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
        return super().forward(hidden_states)


class Qwen3VLTextMLP(stock.Qwen3VLTextMLP):
    def forward(self, x: Tensor) -> Tensor:
        return in_parts(self, self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        if not (is_plain(self.act_fn, _SILU) and no_global_hooks()):
            return stock.Qwen3VLTextMLP.forward(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if kernels_take(gate, up, cast=False):
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
        lower = autocast_dtype(q.device)
        if lower is not None and q.dtype != cos.dtype:  # projections came out lower than tables and norms are
            q, k = q.to(cos.dtype), k.to(cos.dtype)
        if kernels_take(q, k, cos, sin, q_weight, k_weight, cast=False):
            q, k = qvl_kernels.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=self.q_norm.variance_epsilon)
        else:
            q, k = stock.apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), cos, sin, unsqueeze_dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if lower is not None:  # as sdpa under autocast
            q, k, v = q.to(lower), k.to(lower), v.to(lower)
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


_IMPLEMENTATION = "_attn_implementation_internal"  # where a config keeps it; the property on top costs a microsecond


class _Plan:
    """A decoder layer whose modules and weights were found plain, as one fused call; ``holds`` says whether they still are."""

    __slots__ = ("_attention", "_config", "_config_values", "_modules", "_settings", "_tensors", "dtype", "prepared")

    @classmethod
    def of(cls, layer: nn.Module) -> "_Plan | None":
        """The plan of a layer, or None if one fused call is not what its modules compute."""
        children = layer._modules
        attention, mlp = children["self_attn"], children["mlp"]
        if type(attention) is not Qwen3VLTextAttention or type(mlp) is not Qwen3VLTextMLP:
            return None
        norms = [(children, "input_layernorm"), (attention._modules, "q_norm"), (attention._modules, "k_norm"), (children, "post_attention_layernorm")]
        linears = [(attention._modules, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        linears += [(mlp._modules, name) for name in ("gate_proj", "up_proj", "down_proj")]
        plan = cls()
        plan._attention, plan._config, plan._config_values = attention, attention.config, attention.config.__dict__
        plan._modules = [(siblings, name, siblings[name], kinds, siblings[name].__dict__) for group, kinds in (
            ([(children, "mlp")], (Qwen3VLTextMLP,)), (norms, (Qwen3VLTextRMSNorm,)), (linears, (Linear, PackedLinear)),
            ([(mlp._modules, "act_fn")], (_SILU,)),
        ) for siblings, name in group]  # fmt: skip
        norms, linears = ([siblings[name] for siblings, name in group] for group in (norms, linears))
        if any(type(module) not in kinds for _, _, module, kinds, _ in plan._modules):
            return None
        tensors = [(own, name) for module in norms + linears for own in (module._parameters, module._buffers) for name in own]
        plan._tensors = [(own, name, own[name], *_memory(own[name])) for own, name in tensors]
        plan._settings = [(norm.__dict__, "variance_epsilon", norms[0].variance_epsilon) for norm in norms]
        plan._settings += [(attention.__dict__, name, getattr(attention, name)) for name in ("scaling", "is_causal")]
        input_norm, q_norm, k_norm, post_norm = (norm.weight for norm in norms)
        q, k, v, o, gate, up, down = (linear.quantized if type(linear) is PackedLinear else linear.weight for linear in linears)
        q_bias, k_bias, v_bias, o_bias, *mlp_biases = (linear.bias for linear in linears)
        weights = qvl_kernels.DecoderWeights(
            input_norm, q, k, v, q_norm, k_norm, o, post_norm, gate, up, down, q_bias, k_bias, v_bias, o_bias
        )
        plain = [weight for weight in weights if not isinstance(weight, QuantizedWeight)]
        if not attention.is_causal or mlp_biases != [None, None, None] or not kernels_take(*plain) or not plan.holds():
            return None
        plan.dtype = input_norm.dtype
        kind = qvl_kernels.PreparedDecoderLayer if len(plain) == len(weights) else qvl_kernels.QuantizedDecoderLayer
        plan.prepared = kind(
            weights, num_heads=linears[0].out_features // attention.head_dim, kv_heads=linears[1].out_features // attention.head_dim,
            eps=norms[0].variance_epsilon, scale=attention.scaling,
        )  # fmt: skip
        return plan

    def holds(self) -> bool:
        attention = self._attention
        implementation = self._config_values.get(_IMPLEMENTATION)
        if (
            type(attention) is not Qwen3VLTextAttention
            or "forward" in attention.__dict__
            or attention.__dict__.get("config") is not self._config
            or not (
                implementation == "sdpa" and only_capture_hooks(attention)
                or implementation == "eager" and is_plain(attention, Qwen3VLTextAttention)
            )
        ):
            return False
        for siblings, name, module, kinds, state in self._modules:
            if siblings.get(name) is not module or type(module) not in kinds:
                return False
            if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:  # is_plain, without a call
                return False
        for own, name, tensor, pointer, elements, dtype in self._tensors:
            if own.get(name) is not tensor:
                return False
            if tensor is not None and (tensor.data_ptr() != pointer or tensor.numel() != elements or tensor.dtype is not dtype):
                return False
        for own, name, value in self._settings:
            if own.get(name) != value:
                return False
        return True


def _memory(tensor: Tensor | None) -> tuple[int, int, torch.dtype | None]:
    return (0, 0, None) if tensor is None else (tensor.data_ptr(), tensor.numel(), tensor.dtype)


_plans: "weakref.WeakKeyDictionary[nn.Module, _Plan | None]" = weakref.WeakKeyDictionary()


def plan_of(layer: "Qwen3VLTextDecoderLayer") -> _Plan | None:
    """The plan of a layer as it is now, or None if one fused call is not what its modules compute."""
    plan = _plans.get(layer)
    if plan is None or not plan.holds():
        plan = _plans[layer] = _Plan.of(layer)
    return plan


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
        prepared = self._prepared(hidden_states, position_embeddings, attention_mask, kwargs)
        if prepared is not None:
            queries = hidden_states.shape[1]
            store = cache.open_store(
                past_key_values, self._modules["self_attn"].layer_idx, hidden_states, prepared.kv_heads, prepared.head_dim
            )
            if store is not None and _causal_rule_holds(attention_mask, queries, store):
                out = prepared(
                    hidden_states, *position_embeddings, store.keys, store.values, past=store.past, mask=attention_mask
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

    def _prepared(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], mask: Tensor | None, kwargs: dict
    ) -> qvl_kernels.PreparedDecoderLayer | None:
        """The layer as one fused call if that computes what the modules would, else None."""
        # Runs once per layer and token: plain loops and dictionary look-ups, no generators and no __getattr__.
        attention = self._modules["self_attn"]
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled() and _any_requires_grad(hidden_states, self)
            or (self.training and attention.attention_dropout > 0.0)
            or not no_global_hooks()
            or hidden_states.dim() != 3
            or not hidden_states.is_contiguous()
            or splits(self._modules["mlp"], hidden_states)
            or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype in (torch.bool, hidden_states.dtype)))
            or _has_special_arguments(kwargs)
            or not _tables_fit(position_embeddings, hidden_states)
            or not kernels_take(hidden_states, *position_embeddings)
        ):
            return None
        plan = plan_of(self)
        return None if plan is None or plan.dtype is not hidden_states.dtype else plan.prepared


def _any_requires_grad(x: Tensor, layer: nn.Module) -> bool:
    return x.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())


def _causal_rule_holds(mask: Tensor | None, queries: int, store: "cache.Store") -> bool:
    """Whether no mask, or this mask, means to sdpa what it means to ``decoder_layer`` with this cache."""
    keys = store.past + queries
    if mask is None:
        # sdpa sees the whole of what the cache returns, causal from the first key on.
        return (queries == 1 or store.past == 0) and (queries > 1 or store.visible_capacity == keys)
    return mask.shape[3] >= keys
