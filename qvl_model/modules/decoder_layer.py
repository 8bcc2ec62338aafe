"""A decoder layer as one fused call at inference."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

import qvl_kernels
from qvl_kernels.memory import pages
from qvl_kernels.ops.decoder_layer.prepared import Run
from qvl_kernels.quantization import QuantizedWeight
from qvl_model.compat import CACHE, drops_cache, takes_cache
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
    runs_library_code,
)
from qvl_model.modules.linear import Linear
from qvl_model.modules.text import (
    SILU,
    Qwen3VLTextAttention,
    Qwen3VLTextMLP,
    Qwen3VLTextRMSNorm,
    cos_sin_fit,
    has_special_arguments,
)
from qvl_model.quantization.modules import PackedLinear

__all__ = [
    "FusedLayer",
    "Qwen3VLTextDecoderLayer",
    "call_is_eligible",
    "forget_fused_layer",
    "fused_layer_of",
    "plain_fused_layer",
    "run_fused",
]

_LARGE = 2048  # tokens of a call from which on freed memory is returned to the system
_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", *FLASH)  # of attention; the fused call computes the same


class FusedLayer:
    """A decoder layer as one fused call, made when its modules and weights were eligible; ``check`` is the guard that
    says whether they still are.

    The guard compares with lists of what the call depends on. They refer to the dictionaries of modules, not to the
    layer, so that a fused layer does not keep its layer alive:
        modules: (children of a module, name, module); these have no hooks and the forward of their class.
        tensors: (dictionary, name, tensor, address, dtype, shape); ``x.data = ...`` changes the last three.
        no_biases: (dictionary, name) of biases that are None.
        settings: (object, name, value).

    Attributes:
        handle: the layer handle that runs the call.
        implementation: of attention, as the config names it.
    """

    __slots__ = ("_attention", "_modules", "_settings", "_tensors", "_no_biases", "implementation", "handle")

    @classmethod
    def of(cls, layer: nn.Module) -> "FusedLayer | None":
        """The fused layer of a layer, or None if one fused call does not compute what its modules compute."""
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
        except (AttributeError, KeyError):  # not the modules of the stock layer
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
            return None  # a tensor in place of a parameter is recomputed by the code that put it there
        fused_layer = cls()
        fused_layer.implementation, fused_layer._attention = attention.config._attn_implementation, attention
        known = [mlp, activation, *norms, *linears]
        fused_layer._modules = [
            (own._modules, name, x) for own in (layer, attention, mlp) for name, x in own._modules.items() if x in known
        ]
        fused_layer._no_biases = [
            (linear._parameters, "bias") for linear in linears if linear._parameters["bias"] is None
        ]
        fused_layer._tensors = [
            (own, name, x, x.data_ptr(), x.dtype, x.shape)
            for module in norms + linears
            for own in (module._parameters, module._buffers)
            for name, x in own.items()
            if x is not None
        ]
        fused_layer._settings = [(norm, "variance_epsilon", norm.variance_epsilon) for norm in norms]
        fused_layer._settings += [
            (attention, name, getattr(attention, name))
            for name in ("config", "scaling", "is_causal", "head_dim", "num_key_value_groups")
        ]
        if not fused_layer.check(layer) or not _weights_fit(attention, norms, linears):
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
        fused_layer.handle = kind(
            weights, **_heads(attention, linears), eps=norms[0].variance_epsilon, scale=attention.scaling
        )
        return fused_layer

    def check(self, layer: nn.Module) -> bool:
        """The guard: whether all that the fused layer depends on is unchanged. It runs for every layer and token."""
        attention = layer._modules.get("self_attn")
        if (
            attention is not self._attention
            or type(attention) is not Qwen3VLTextAttention
            or not self._attention_is_eligible()
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
        for own, name in self._no_biases:
            if own.get(name, True) is not None:
                return False
        for owner, name, value in self._settings:
            if getattr(owner, name) is not value:
                return False
        return True

    def _attention_is_eligible(self) -> bool:
        attention, implementation = self._attention, self.implementation
        if (
            attention.config._attn_implementation != implementation
            or implementation not in _IMPLEMENTATIONS
            or not attends_as_stock(implementation)
        ):
            return False
        if "forward" in attention.__dict__:
            return False
        # A fused call has no attention weights for a recorder to find.
        return (
            is_eligible(attention, Qwen3VLTextAttention)
            if implementation == "eager"
            else only_capture_hooks(attention, "attentions")
        )


_KINDS = {Qwen3VLTextMLP, SILU, Qwen3VLTextRMSNorm, Linear, PackedLinear}
_fused_layers: "weakref.WeakKeyDictionary[nn.Module, FusedLayer]" = weakref.WeakKeyDictionary()


def fused_layer_of(layer: nn.Module) -> FusedLayer | None:
    """The fused layer of a layer as it is now, or None if one fused call does not compute what its modules compute."""
    fused_layer = _fused_layers.get(layer)
    if fused_layer is None or not fused_layer.check(layer):
        _fused_layers.pop(layer, None)
        fused_layer = FusedLayer.of(layer)
        if fused_layer is not None:
            _fused_layers[layer] = fused_layer
    return fused_layer


def _heads(attention: nn.Module, linears: list[nn.Module]) -> dict[str, int]:
    """Numbers of query and key/value heads, from the shapes of the weights."""
    q, k, *_ = linears
    return {
        "num_heads": len(q._parameters["weight"]) // attention.head_dim,
        "kv_heads": len(k._parameters["weight"]) // attention.head_dim,
    }


def _weights_fit(attention: nn.Module, norms: list[nn.Module], linears: list[nn.Module]) -> bool:
    """Whether one fused call takes these sizes, numbers and dtypes. Users may edit them; stock code then computes with
    the edited values.
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
    dense = [norm.weight for norm in norms]
    dense += [linear.weight for linear in linears if type(linear) is not PackedLinear]
    dense += [linear.bias for linear in linears[:4] if linear.bias is not None]
    return all(linear.bias is None for linear in linears[4:]) and kernels_take(*dense)


def forget_fused_layer(layer: nn.Module) -> None:
    """Frees the weights that the fused layer of a layer holds, if there is one."""
    _fused_layers.pop(layer, None)


class Qwen3VLTextDecoderLayer(stock.Qwen3VLTextDecoderLayer):
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
        """The layer as one fused call, or None if that does not compute what its modules compute."""
        cos_sin, mask, positions, cache = position_embeddings, attention_mask, position_ids, kwargs.pop(CACHE)
        if not call_is_eligible(x, cos_sin, mask, kwargs):
            return None
        if torch.is_grad_enabled() and _any_requires_grad((x, *cos_sin, mask), self):
            return None
        fused_layer = _fused_layer_for(self, x.dtype)
        if fused_layer is None:
            return None
        if x.is_cpu and x.shape[0] * x.shape[1] >= _LARGE:
            # Takes milliseconds, the layer tenths of a second; else freed memory and the KV cache add up.
            pages.return_freed_memory()
        return run_fused([self], [fused_layer], x, cos_sin, mask, positions, cache)

    def is_deterministic(self) -> bool:
        """Whether no dropout site of the layer is active now."""
        attention = self._modules["self_attn"]
        return not (attention.training and attention.attention_dropout > 0.0)


def plain_fused_layer(layer: nn.Module, dtype: torch.dtype) -> FusedLayer | None:
    """The fused layer of a layer whose call is one fused call and nothing else, on hidden states of ``dtype``; None if
    it has hooks, another forward, dropout, or is not eligible.
    """
    if (
        layer._forward_pre_hooks
        or not only_capture_hooks(layer, "hidden_states")
        or not runs_library_code(layer, "forward", "__call__")
        or drops_cache(layer)
    ):
        return None
    return _fused_layer_for(layer, dtype)


def _fused_layer_for(layer: nn.Module, dtype: torch.dtype) -> FusedLayer | None:
    """The fused layer of a layer, if it takes hidden states of ``dtype`` and no dropout is active."""
    fused_layer = fused_layer_of(layer)
    if fused_layer is None or fused_layer.handle.dtype is not dtype or not layer.is_deterministic():
        return None
    return fused_layer


def run_fused(
    layers: list[nn.Module],
    fused_layers: list[FusedLayer],
    x: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    mask: Tensor | None,
    positions: Tensor | None,
    cache: Cache | None,
) -> Tensor | None:
    """The output [B, T, C] of consecutive layers, run in one call, or None where stock code must update the KV cache,
    mask the keys or split the MLP. The cache gets the new keys and values.
    """
    if any(splits(layer._modules["mlp"], x) for layer in layers):
        return None
    reserved: list[WriteSlots] = []
    for layer, fused_layer in zip(layers, fused_layers):
        handle = fused_layer.handle
        slots = reserve_slots(cache, layer._modules["self_attn"].layer_idx, x, handle.kv_heads, handle.head_dim)
        if slots is None or not _mask_is_equivalent(fused_layer.implementation, mask, positions, x, slots):
            return None
        reserved.append(slots)
    past = reserved[0].past
    if any(slots.past != past for slots in reserved):
        return None
    if mask is not None and mask.dim() == 2:
        mask = _causal_mask(mask, x.shape[1])
    run = Run([fused_layer.handle for fused_layer in fused_layers], [slots.memory for slots in reserved])
    out = run(x, *cos_sin, past=past, mask=mask)
    for slots in reserved:
        slots.commit(x.shape[1])
    return out


def call_is_eligible(x: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Tensor | None, kwargs: dict) -> bool:
    """Whether fused calls take these arguments, independent of the layer."""
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
        and cos_sin_fit(cos_sin, x)
        and kernels_take(x, *cos_sin)
    )


def _any_requires_grad(inputs: tuple[Tensor | None, ...], layer: nn.Module) -> bool:
    return any(x is not None and x.requires_grad for x in inputs) or any(
        parameter.requires_grad for parameter in layer.parameters()
    )


def _mask_is_equivalent(
    implementation: str, mask: Tensor | None, positions: Tensor | None, x: Tensor, slots: WriteSlots
) -> bool:
    """Whether ``decoder_layer`` with this cache masks the same keys as the model's attention does, given this mask or
    no mask.
    """
    queries, keys = x.shape[1], slots.past + x.shape[1]
    if implementation in FLASH:  # causal, aligned at the last key; a mask marks padding
        varlen = (
            positions is not None and x.shape[0] == 1 and queries > 1 and not bool((positions.diff() == 1).all())
        )  # several sequences in one row
        return (
            not varlen
            and slots.visible_capacity == keys
            and (mask is None or mask.dim() == 2 and mask.shape[1] == keys)
        )
    if mask is None:
        # sdpa sees all that the cache returns, and its causal mask is aligned at the first key; the others are not
        # causal by themselves.
        first = slots.past == 0 and implementation == "sdpa"
        return (queries == 1 or first) and (queries > 1 or slots.visible_capacity == keys)
    if implementation == "eager" and mask.dtype is torch.bool:
        return False  # added to the scores as 0 and 1
    return mask.dim() == 4 and mask.shape[3] == slots.visible_capacity


def _causal_mask(mask: Tensor, queries: int) -> Tensor:
    """[B, 1, T, S]: the causal mask of the last T tokens, and the padding mask [B, S]."""
    keys = mask.shape[1]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    return mask.bool()[:, None, None] & causal


def __getattr__(name: str) -> Any:  # transformers looks functions up in the module of a class
    return getattr(stock, name)
