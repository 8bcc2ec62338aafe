"""A decoder layer as one fused call at inference."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

import qvl_kernels
from qvl_kernels.memory import pages
from qvl_kernels.quantization import QuantizedWeight
from qvl_model.compat import CACHE, takes_cache
from qvl_model.generation.kv_cache import WriteSlots, reserve_slots
from qvl_model.modules.chunked_mlp import splits
from qvl_model.modules.fast_path import (
    FLASH,
    attends_as_stock,
    is_eligible,
    is_number,
    kernels_take,
    no_global_hooks,
    only_capture_hooks,
)
from qvl_model.modules.linear import Linear
from qvl_model.modules.text import (
    SILU,
    Qwen3VLTextAttention,
    Qwen3VLTextMLP,
    Qwen3VLTextRMSNorm,
    has_special_arguments,
    tables_fit,
)
from qvl_model.quantization.modules import PackedLinear

__all__ = ["FusedLayer", "Qwen3VLTextDecoderLayer", "forget_fused_layer", "fused_layer_of"]

_LARGE = 2048  # tokens of a call after which what was freed goes back to the system
_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", *FLASH)  # of attention: what they compute, the fused call does


class FusedLayer:
    """A decoder layer whose modules and weights were found plain, as one fused call; ``check`` says whether they still
    are.

    Whatever the call depends on stands in lists, as it was found. Dictionaries stand for modules, so that no plan keeps
        its layer alive: modules: (children of a module, name, module), without hooks and with their classes' own
            forward.
        tensors: (dictionary, name, tensor, address, dtype, shape). ``x.data = ...`` changes the memory of a tensor, or
            how it is read.
        without: (dictionary, name) of biases that are None.
        settings: (object, name, value).

    Attributes:
        prepared: the call. implementation: of attention, as the config names it.
    """

    __slots__ = ("_attention", "_modules", "_settings", "_tensors", "_without", "implementation", "prepared")

    @classmethod
    def of(cls, layer: nn.Module) -> "FusedLayer | None":
        """The plan of a layer, or None if one fused call is not what its modules compute."""
        try:
            attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
            norms = [
                layer._modules["input_layernorm"],
                *(attention._modules[name] for name in ("q_norm", "k_norm")),
                layer._modules["post_attention_layernorm"],
            ]
            linears = [attention._modules[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
            linears += [mlp._modules[name] for name in ("gate_proj", "up_proj", "down_proj")]
            activation = mlp._modules["act_fn"]
        except (AttributeError, KeyError):  # other modules than those of the stock layer
            return None
        kinds = (
            ([mlp], (Qwen3VLTextMLP,)),
            ([activation], (SILU,)),
            (norms, (Qwen3VLTextRMSNorm,)),
            (linears, (Linear, PackedLinear)),
        )
        if type(attention) is not Qwen3VLTextAttention or any(
            type(module) not in accepted for modules, accepted in kinds for module in modules
        ):
            return None
        if any(
            module._parameters.get("weight") is None or "bias" not in module._parameters and module in linears
            for module in norms + linears
        ):
            return None  # a tensor in the place of a parameter is computed anew by whoever put it there
        plan = cls()
        plan.implementation, plan._attention = attention.config._attn_implementation, attention
        known = [mlp, activation, *norms, *linears]
        plan._modules = [
            (own._modules, name, x) for own in (layer, attention, mlp) for name, x in own._modules.items() if x in known
        ]
        plan._without = [(linear._parameters, "bias") for linear in linears if linear._parameters["bias"] is None]
        plan._tensors = [
            (own, name, x, x.data_ptr(), x.dtype, x.shape)
            for module in norms + linears
            for own in (module._parameters, module._buffers)
            for name, x in own.items()
            if x is not None
        ]
        plan._settings = [(norm, "variance_epsilon", norm.variance_epsilon) for norm in norms]
        plan._settings += [
            (attention, name, getattr(attention, name))
            for name in ("config", "scaling", "is_causal", "head_dim", "num_key_value_groups")
        ]
        if not plan.check(layer) or not _weights_fit(attention, norms, linears):
            return None
        input_norm, q_norm, k_norm, post_norm = (norm.weight for norm in norms)
        q, k, v, o, gate, up, down = (
            linear.quantized if type(linear) is PackedLinear else linear.weight for linear in linears
        )
        q_bias, k_bias, v_bias, o_bias, *_ = (linear.bias for linear in linears)
        weights = qvl_kernels.DecoderWeights(
            input_norm, q, k, v, q_norm, k_norm, o, post_norm, gate, up, down, q_bias, k_bias, v_bias, o_bias
        )
        quantised = any(isinstance(weight, QuantizedWeight) for weight in weights)
        kind = qvl_kernels.QuantizedDecoderLayer if quantised else qvl_kernels.PreparedDecoderLayer
        plan.prepared = kind(
            weights, **_heads(attention, linears), eps=norms[0].variance_epsilon, scale=attention.scaling
        )
        return plan

    def check(self, layer: nn.Module) -> bool:
        """Whether all that the plan of ``layer`` depends on is as it was; it runs for every layer and token."""
        attention = layer._modules.get("self_attn")
        if (
            attention is not self._attention
            or type(attention) is not Qwen3VLTextAttention
            or not self._attention_is_plain()
        ):
            return False
        for siblings, name, module in self._modules:
            if siblings.get(name) is not module or not is_eligible(module, type(module)) or type(module) not in _KINDS:
                return False
        for own, name, x, address, dtype, shape in self._tensors:
            if (
                own.get(name) is not x
                or x.data_ptr() != address
                or x.dtype is not dtype
                or x.shape != shape
                or not x.is_contiguous()
            ):
                return False
        for own, name in self._without:
            if own.get(name, True) is not None:
                return False
        for owner, name, value in self._settings:
            if getattr(owner, name) is not value:
                return False
        return True

    def _attention_is_plain(self) -> bool:
        attention, implementation = self._attention, self.implementation
        if (
            attention.config._attn_implementation != implementation
            or implementation not in _IMPLEMENTATIONS
            or not attends_as_stock(implementation)
        ):
            return False
        if "forward" in attention.__dict__:
            return False
        # A recorder of attentions finds none in a fused call.
        return (
            is_eligible(attention, Qwen3VLTextAttention)
            if implementation == "eager"
            else only_capture_hooks(attention, "attentions")
        )


_KINDS = {Qwen3VLTextMLP, SILU, Qwen3VLTextRMSNorm, Linear, PackedLinear}
_plans: "weakref.WeakKeyDictionary[nn.Module, FusedLayer]" = weakref.WeakKeyDictionary()


def fused_layer_of(layer: nn.Module) -> FusedLayer | None:
    """The plan of a layer as it is now, or None if one fused call is not what its modules compute."""
    plan = _plans.get(layer)
    if plan is None or not plan.check(layer):
        _plans.pop(layer, None)
        plan = FusedLayer.of(layer)
        if plan is not None:
            _plans[layer] = plan
    return plan


def _heads(attention: nn.Module, linears: list[nn.Module]) -> dict[str, int]:
    """Query and key/value heads, as the weights have them."""
    q, k, *_ = linears
    return {
        "num_heads": len(q._parameters["weight"]) // attention.head_dim,
        "kv_heads": len(k._parameters["weight"]) // attention.head_dim,
    }


def _weights_fit(attention: nn.Module, norms: list[nn.Module], linears: list[nn.Module]) -> bool:
    """Whether the sizes, numbers and dtypes are those of one fused call; stock code takes what was changed by hand at
    its word.
    """
    epsilon = norms[0].variance_epsilon
    if (
        not is_number(epsilon, attention.scaling)
        or any(norm.variance_epsilon != epsilon for norm in norms)
        or not attention.is_causal
    ):
        return False
    if attention.head_dim != len(norms[1].weight):
        return False
    heads = _heads(attention, linears)
    if heads["num_heads"] != heads["kv_heads"] * attention.num_key_value_groups:
        return False
    plain = [norm.weight for norm in norms]
    plain += [linear.weight for linear in linears if type(linear) is not PackedLinear]
    plain += [linear.bias for linear in linears[:4] if linear.bias is not None]
    return all(linear.bias is None for linear in linears[4:]) and kernels_take(*plain)


def forget_fused_layer(layer: nn.Module) -> None:
    """Frees the weights that the plan of a layer, if it has one, holds."""
    _plans.pop(layer, None)


class Qwen3VLTextDecoderLayer(stock.Qwen3VLTextDecoderLayer):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """A plain layer at inference goes past ``nn.Module``'s own call and all that decorates ``forward``: a third of
        a token's time here.
        """
        ours = type(self).forward is Qwen3VLTextDecoderLayer.forward  # and not overridden by a subclass
        if (
            ours
            and len(args) == 1
            and CACHE in kwargs
            and not torch.is_grad_enabled()
            and is_eligible(self, type(self))
        ):
            out = self._fused(args[0], **kwargs)
            if out is not None:
                return out
        return super().__call__(*args, **kwargs)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            CACHE: cache,
            **kwargs,
        }
        out = self._fused(hidden_states, position_embeddings, **arguments)
        if out is not None:
            return out
        return super().forward(
            hidden_states,
            position_embeddings=position_embeddings,
            **arguments,
        )

    def _fused(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor | None:
        """The layer in one call, or None if that is not what its modules compute."""
        tables, mask, positions, cache = position_embeddings, attention_mask, position_ids, kwargs.pop(CACHE)
        if not _call_is_plain(x, tables, mask, kwargs):
            return None
        if torch.is_grad_enabled() and _any_requires_grad(x, self):
            return None
        plan = fused_layer_of(self)
        if (
            plan is None
            or plan.prepared.dtype is not x.dtype
            or not self.is_deterministic()
            or splits(self._modules["mlp"], x)
        ):
            return None
        prepared = plan.prepared
        store = reserve_slots(cache, self._modules["self_attn"].layer_idx, x, prepared.kv_heads, prepared.head_dim)
        if store is None or not _rule_holds(plan.implementation, mask, positions, x, store):
            return None
        if mask is not None and mask.dim() == 2:
            mask = _causal_mask(mask, x.shape[1])
        if x.is_cpu and x.shape[0] * x.shape[1] >= _LARGE:
            pages.trim()  # else it adds up with the cache; milliseconds beside the tenths of a second of the layer
        (out,) = qvl_kernels.PreparedDecoderLayer.run(
            [prepared], x, *tables, [store.memory], past=store.past, mask=mask
        )
        store.commit(x.shape[1])
        return out

    def is_deterministic(self) -> bool:
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
        and x.numel() > 0
        and x.is_contiguous()
        and (
            mask is None
            or (
                isinstance(mask, Tensor)
                and (mask.dim() == 4 and mask.dtype in (torch.bool, x.dtype) or mask.dim() == 2)
            )
        )
        and not has_special_arguments(kwargs)
        and tables_fit(tables, x)
        and kernels_take(x, *tables)
    )


def _any_requires_grad(x: Tensor, layer: nn.Module) -> bool:
    return x.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())


def _rule_holds(
    implementation: str, mask: Tensor | None, positions: Tensor | None, x: Tensor, store: WriteSlots
) -> bool:
    """Whether no mask, or this mask, means to the attention of the model what it means to ``decoder_layer`` with this
    cache.
    """
    queries, keys = x.shape[1], store.past + x.shape[1]
    if implementation in FLASH:  # causal to the last key; a mask says which tokens are no padding
        packed = (
            positions is not None and x.shape[0] == 1 and queries > 1 and not bool((positions.diff() == 1).all())
        )  # several texts in one row
        return (
            not packed
            and store.visible_capacity == keys
            and (mask is None or mask.dim() == 2 and mask.shape[1] == keys)
        )
    if mask is None:
        # sdpa sees the whole of what the cache returns, causal from the first key on; flex_attention is not causal by
        # itself.
        first = store.past == 0 and implementation != "flex_attention"
        return (queries == 1 or first) and (queries > 1 or store.visible_capacity == keys)
    return mask.dim() == 4 and mask.shape[3] >= keys


def _causal_mask(mask: Tensor, queries: int) -> Tensor:
    """[B, 1, T, keys]: of the keys that ``mask`` [B, keys] shows, those up to each of the last T tokens."""
    keys = mask.shape[1]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    return mask.bool()[:, None, None] & causal


def __getattr__(name: str) -> Any:  # transformers looks functions up in the module of a class
    return getattr(stock, name)
