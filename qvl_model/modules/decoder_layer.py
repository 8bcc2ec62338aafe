"""A decoder layer as one fused call at inference."""

import weakref

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

import qvl_kernels
from qvl_kernels import pages
from qvl_kernels.quant import QuantizedWeight
from qvl_model.compat import CACHE, takes_cache
from qvl_model.generation.kv_cache import Store, open_store
from qvl_model.modules.linear import Linear
from qvl_model.modules.packed import PackedLinear
from qvl_model.modules.parts import splits
from qvl_model.modules.plain import FLASH, attends_as_stock, is_number, is_plain, kernels_take, no_global_hooks, only_capture_hooks
from qvl_model.modules.text import SILU, Qwen3VLTextAttention, Qwen3VLTextMLP, Qwen3VLTextRMSNorm, has_special_arguments, tables_fit

__all__ = ["Plan", "Qwen3VLTextDecoderLayer", "forget_plan", "plan_of"]

_LARGE = 2048  # tokens of a call after which what was freed goes back to the system
_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", *FLASH)  # of attention: what they compute, the fused call does


class Plan:
    """A decoder layer whose modules and weights were found plain, as one fused call.

    Attributes:
        prepared: the call. implementation: of attention, as the config names it.
        state: all that it depends on, as it was found: see ``layer_state``.
    """

    __slots__ = ("implementation", "prepared", "state")

    def __init__(self, layer: nn.Module, state: tuple) -> None:
        norms, linears = _norms_and_linears(layer)
        input_norm, q_norm, k_norm, post_norm = (norm.weight for norm in norms)
        q, k, v, o, gate, up, down = (linear.quantized if type(linear) is PackedLinear else linear.weight for linear in linears)
        q_bias, k_bias, v_bias, o_bias, *_ = (linear.bias for linear in linears)
        weights = qvl_kernels.DecoderWeights(
            input_norm, q, k, v, q_norm, k_norm, o, post_norm, gate, up, down, q_bias, k_bias, v_bias, o_bias
        )
        quantised = any(isinstance(weight, QuantizedWeight) for weight in weights)
        kind = qvl_kernels.QuantizedDecoderLayer if quantised else qvl_kernels.PreparedDecoderLayer
        attention = layer.self_attn
        self.state, self.implementation = state, attention.config._attn_implementation
        self.prepared = kind(weights, **_heads(layer), eps=norms[0].variance_epsilon, scale=attention.scaling)


def layer_state(layer: nn.Module) -> tuple | None:
    """All that a fused call of a layer depends on, as values that can be compared; None if one call is not what its modules compute."""
    try:
        norms, linears = _norms_and_linears(layer)
        attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
        activation = mlp._modules["act_fn"]
    except (AttributeError, KeyError):  # other modules than those of the stock layer
        return None
    if type(attention) is not Qwen3VLTextAttention or not is_plain(mlp, Qwen3VLTextMLP) or not is_plain(activation, SILU):
        return None
    implementation = attention.config._attn_implementation
    if implementation not in _IMPLEMENTATIONS or not attends_as_stock(implementation) or "forward" in attention.__dict__ or not attention.is_causal:
        return None
    if not (is_plain(attention, Qwen3VLTextAttention) if implementation == "eager" else only_capture_hooks(attention, "attentions")):
        return None  # a recorder of attentions finds none in a fused call
    epsilon, scaling = norms[0].variance_epsilon, attention.scaling
    if not is_number(epsilon, scaling):
        return None
    state = [implementation, scaling, attention.head_dim, attention.num_key_value_groups, epsilon]
    for norm in norms:
        weight = norm._parameters.get("weight")
        if weight is None or not is_plain(norm, Qwen3VLTextRMSNorm) or norm.variance_epsilon != epsilon:
            return None
        state += _tensor_state(weight)
    for linear in linears:
        kind, held = type(linear), linear._parameters
        if kind is not Linear and kind is not PackedLinear or not is_plain(linear, kind) or held.get("weight") is None or "bias" not in held:
            return None
        for x in (*held.values(), *linear._buffers.values()):
            if x is not None:
                state += _tensor_state(x)
    return tuple(state)


def _norms_and_linears(layer: nn.Module) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    children = layer._modules
    attention, mlp = children["self_attn"]._modules, children["mlp"]._modules
    norms = children["input_layernorm"], attention["q_norm"], attention["k_norm"], children["post_attention_layernorm"]
    linears = (
        attention["q_proj"], attention["k_proj"], attention["v_proj"], attention["o_proj"], mlp["gate_proj"], mlp["up_proj"], mlp["down_proj"],
    )  # fmt: skip
    return norms, linears


def _tensor_state(x: Tensor) -> tuple:
    """Which object, and what memory it shows: ``x.data = ...`` keeps the object, a new parameter may get the memory of an old one, and memory
    may be freed under it."""
    return id(x), x.data_ptr(), x.untyped_storage().nbytes(), x.dtype, x.shape, x.is_contiguous()


_plans: "weakref.WeakKeyDictionary[nn.Module, Plan]" = weakref.WeakKeyDictionary()


def plan_of(layer: nn.Module) -> Plan | None:
    """The plan of a layer as it is now, or None if one fused call is not what its modules compute."""
    state, plan = layer_state(layer), _plans.get(layer)
    if state is None:
        return None
    if plan is None or plan.state != state:
        plan = None
        if _weights_fit(layer):
            plan = _plans[layer] = Plan(layer, state)
    return plan


def _heads(layer: nn.Module) -> dict[str, int]:
    """Query and key/value heads, as the weights have them."""
    head_dim = layer.self_attn.head_dim
    _, (q, k, *_) = _norms_and_linears(layer)
    return {"num_heads": len(q._parameters["weight"]) // head_dim, "kv_heads": len(k._parameters["weight"]) // head_dim}


def _weights_fit(layer: nn.Module) -> bool:
    norms, linears = _norms_and_linears(layer)
    attention = layer.self_attn
    if attention.head_dim != len(attention.q_norm.weight):  # changed by hand, which stock code takes at its word
        return False
    heads = _heads(layer)
    if heads["num_heads"] != heads["kv_heads"] * attention.num_key_value_groups:
        return False
    plain = [norm.weight for norm in norms]
    plain += [linear.weight for linear in linears if type(linear) is not PackedLinear]
    plain += [linear.bias for linear in linears[:4] if linear.bias is not None]
    return all(linear.bias is None for linear in linears[4:]) and kernels_take(*plain)


def forget_plan(layer: nn.Module) -> None:
    """Frees the weights that the plan of a layer, if it has one, holds."""
    _plans.pop(layer, None)


class Qwen3VLTextDecoderLayer(stock.Qwen3VLTextDecoderLayer):
    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        use_cache: bool | None = False,
        **kwargs,
    ) -> Tensor:
        if _call_is_plain(hidden_states, position_embeddings, attention_mask, kwargs):
            out = self._fused(hidden_states, position_embeddings, attention_mask, position_ids, cache)
            if out is not None:
                return out
        return super().forward(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )

    def _fused(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, positions: Tensor | None, cache) -> Tensor | None:
        """The layer in one call, or None if that is not what its modules compute."""
        if torch.is_grad_enabled() and _any_requires_grad(x, self):
            return None
        plan = plan_of(self)
        if plan is None or plan.prepared.dtype is not x.dtype or not self.infers() or splits(self._modules["mlp"], x):
            return None
        prepared = plan.prepared
        store = open_store(cache, self._modules["self_attn"].layer_idx, x, prepared.kv_heads, prepared.head_dim)
        if store is None or not _rule_holds(plan.implementation, mask, positions, x, store):
            return None
        if mask is not None and mask.dim() == 2:
            mask = _causal_mask(mask, x.shape[1])
        if x.is_cpu and x.shape[0] * x.shape[1] >= _LARGE:
            pages.trim()  # else it adds up with the cache; milliseconds beside the tenths of a second of the layer
        (out,) = qvl_kernels.PreparedDecoderLayer.run([prepared], x, *tables, [store.memory], past=store.past, mask=mask)
        store.commit(x.shape[1])
        return out

    def infers(self) -> bool:
        """Whether nothing in the layer is random now."""
        attention = self._modules["self_attn"]
        return not (attention.training and attention.attention_dropout > 0.0)


def _call_is_plain(x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, kwargs: dict) -> bool:
    """Whether fused calls take these arguments, whatever the layer."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # a trace would hold the results as constants
        and no_global_hooks()
        and x.dim() == 3
        and x.is_contiguous()
        and (mask is None or (isinstance(mask, Tensor) and (mask.dim() == 4 and mask.dtype in (torch.bool, x.dtype) or mask.dim() == 2)))
        and not has_special_arguments(kwargs)
        and tables_fit(tables, x)
        and kernels_take(x, *tables)
    )


def _any_requires_grad(x: Tensor, layer: nn.Module) -> bool:
    return x.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())


def _rule_holds(implementation: str, mask: Tensor | None, positions: Tensor | None, x: Tensor, store: Store) -> bool:
    """Whether no mask, or this mask, means to the attention of the model what it means to ``decoder_layer`` with this cache."""
    queries, keys = x.shape[1], store.past + x.shape[1]
    if implementation in FLASH:  # causal to the last key; a mask says which tokens are no padding
        packed = positions is not None and x.shape[0] == 1 and queries > 1 and not bool((positions.diff() == 1).all())  # several texts in one row
        return not packed and store.visible_capacity == keys and (mask is None or mask.dim() == 2 and mask.shape[1] == keys)
    if mask is None:
        # sdpa sees the whole of what the cache returns, causal from the first key on; flex_attention is not causal by itself.
        first = store.past == 0 and implementation != "flex_attention"
        return (queries == 1 or first) and (queries > 1 or store.visible_capacity == keys)
    return mask.dim() == 4 and mask.shape[3] >= keys


def _causal_mask(mask: Tensor, queries: int) -> Tensor:
    """[B, 1, T, keys]: of the keys that ``mask`` [B, keys] shows, those up to each of the last T tokens."""
    keys = mask.shape[1]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    return mask.bool()[:, None, None] & causal


def __getattr__(name: str):  # transformers looks functions up in the module of a class
    return getattr(stock, name)
