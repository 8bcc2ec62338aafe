"""A decoder layer as one fused call at inference, together with those that follow it while tokens are decoded."""

import functools
import weakref

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

import qvl_kernels
from qvl_kernels import dispatch, pages
from qvl_kernels.quant import QuantizedWeight
from qvl_model.cache import Store, open_stores
from qvl_model.compat import CACHE, takes_cache
from qvl_model.modules.linear import Linear
from qvl_model.modules.lookahead import Step, followers, learned, look_ahead, output_ahead
from qvl_model.modules.packed import PackedLinear
from qvl_model.modules.parts import splits
from qvl_model.modules.plain import is_plain, kernels_take, no_global_hooks, only_capture_hooks
from qvl_model.modules.text import SILU, Qwen3VLTextAttention, Qwen3VLTextMLP, Qwen3VLTextRMSNorm, has_special_arguments, tables_fit

__all__ = ["Plan", "Qwen3VLTextDecoderLayer", "forget_plan", "plan_of"]

_LARGE = 2048  # tokens of a call after which what was freed goes back to the system
_RANDOM = ("training", "attention_dropout", "p")  # attributes that say whether a module drops anything
_IMPLEMENTATION = "_attn_implementation_internal"  # where a config keeps it; the property on top costs a microsecond


class Plan:
    """A decoder layer whose modules and weights were found plain, as one fused call; ``holds`` says whether they still are.

    Attributes:
        prepared: the call.
        watch: of all that was found, but for hooks of ``attention``, of which those of transformers are harmless mostly.
        chain: the layers that ran after this one, as far as they can be one call with it.
    """

    __slots__ = ("attention", "chain", "implementation", "prepared", "watch")

    @classmethod
    def of(cls, layer: nn.Module) -> "Plan | None":
        """The plan of a layer, or None if one fused call is not what its modules compute."""
        children = layer._modules
        attention, mlp = children["self_attn"], children["mlp"]
        if type(attention) is not Qwen3VLTextAttention or type(mlp) is not Qwen3VLTextMLP:
            return None
        norms = [(children, "input_layernorm"), (attention._modules, "q_norm"), (attention._modules, "k_norm"), (children, "post_attention_layernorm")]
        linears = [(attention._modules, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        linears += [(mlp._modules, name) for name in ("gate_proj", "up_proj", "down_proj")]
        others = [(children, "mlp"), (mlp._modules, "act_fn")]
        places = [(siblings, name, siblings[name]) for siblings, name in others + norms + linears]
        norms, linears = ([siblings[name] for siblings, name in group] for group in (norms, linears))
        groups = (([mlp], (Qwen3VLTextMLP,)), ([mlp.act_fn], (SILU,)), (norms, (Qwen3VLTextRMSNorm,)), (linears, (Linear, PackedLinear)))
        if any(type(module) not in kinds or not is_plain(module, type(module)) for modules, kinds in groups for module in modules):
            return None
        input_norm, q_norm, k_norm, post_norm = (norm.weight for norm in norms)
        q, k, v, o, gate, up, down = (linear.quantized if type(linear) is PackedLinear else linear.weight for linear in linears)
        q_bias, k_bias, v_bias, o_bias, *mlp_biases = (linear.bias for linear in linears)
        weights = qvl_kernels.DecoderWeights(
            input_norm, q, k, v, q_norm, k_norm, o, post_norm, gate, up, down, q_bias, k_bias, v_bias, o_bias
        )
        plain = [weight for weight in weights if not isinstance(weight, QuantizedWeight)]
        same_eps = all(norm.variance_epsilon == norms[0].variance_epsilon for norm in norms)
        if not same_eps or not attention.is_causal or mlp_biases != [None, None, None] or not kernels_take(*plain):
            return None
        plan = cls()
        plan.attention, plan.chain = attention, None
        settings, modules = vars(attention.config), [module for _, _, module in places]
        tensors = [(own, name, own[name]) for module in norms + linears for own in (module._parameters, module._buffers) for name in own]
        plan.implementation = settings.get(_IMPLEMENTATION)
        plan.watch = dispatch.extension().Watch(
            entries=[
                *places, *tensors, *((vars(norm), "variance_epsilon", norm.variance_epsilon) for norm in norms),
                *((vars(attention), name, getattr(attention, name)) for name in ("config", "scaling", "is_causal")),
                (settings, _IMPLEMENTATION, plan.implementation),
            ],
            absent=[(vars(module), "forward") for module in (attention, *modules)],
            empty=[(vars(module), hooks) for module in modules for hooks in ("_forward_hooks", "_forward_pre_hooks")],
            types=[attention, *modules],
            tensors=[tensor for _, _, tensor in tensors if tensor is not None],
        )  # fmt: skip
        if not plan.holds():
            return None
        kind = qvl_kernels.PreparedDecoderLayer if len(plain) == len(weights) else qvl_kernels.QuantizedDecoderLayer
        plan.prepared = kind(
            weights, num_heads=linears[0].out_features // attention.head_dim, kv_heads=linears[1].out_features // attention.head_dim,
            eps=norms[0].variance_epsilon, scale=attention.scaling,
        )  # fmt: skip
        return plan

    def holds(self) -> bool:
        return self._hooks_are_harmless() and self.watch.all_hold([self.watch])

    def _hooks_are_harmless(self) -> bool:
        if self.implementation == "sdpa":
            return only_capture_hooks(self.attention)
        return self.implementation == "eager" and is_plain(self.attention, Qwen3VLTextAttention)


_plans: "weakref.WeakKeyDictionary[nn.Module, Plan | None]" = weakref.WeakKeyDictionary()


@functools.cache
def watch_sees_dtypes() -> bool:
    """Whether a watch notices another dtype in the same memory: not with PyTorch 2.9. Plans are made anew in every call then."""
    x = torch.zeros(1)
    watch = dispatch.extension().Watch(entries=[], absent=[], empty=[], types=[], tensors=[x])
    x.data = x.data.view(torch.int32)
    return not watch.all_hold([watch])


def plan_of(layer: "Qwen3VLTextDecoderLayer") -> Plan | None:
    """The plan of a layer as it is now, or None if one fused call is not what its modules compute."""
    plan = _plans.get(layer)
    if plan is None or not watch_sees_dtypes() or not plan.holds():
        plan = _plans[layer] = Plan.of(layer)
    return plan


def forget_plan(layer: nn.Module) -> None:
    """Frees the weights that the plan of a layer, if it has one, holds: its own and those of the layers in its chain."""
    _plans.pop(layer, None)


class Chain:
    """Layers that ran one after the other and are one call as long as ``holds``: of one shape, without hooks, none of them random.

    Attributes:
        layers: all but the first. The plan of the first owns the chain, which must not own that layer.
        calls, indices: of all, the fused call and the place in caches.
    """

    __slots__ = ("_learned", "_watches", "calls", "indices", "layers")

    def __init__(self, first: "Qwen3VLTextDecoderLayer") -> None:
        self._learned, self._watches, self.calls, self.indices, self.layers = learned(), [], [], [], []
        entries, absent, hooked, typed = [], [], [], []
        for layer in (first, *followers(first)):
            plan, index = plan_of(layer), layer._modules["self_attn"].layer_idx
            places = [(siblings, name, siblings[name]) for siblings, name in layer.random_places()]
            random = [module for _, _, module in places]
            hooks = [(vars(module), hooks) for module in (layer, *random) for hooks in ("_forward_hooks", "_forward_pre_hooks")]
            if plan is None or type(layer) is not type(first) or "forward" in vars(layer) or any(state[name] for state, name in hooks):
                break
            if not layer.infers():
                break
            if layer is not first:
                if index <= self.indices[-1] or plan.prepared.sizes != self.calls[0].sizes:
                    break
                self.layers.append(layer)
                typed.append(layer)
            self.calls.append(plan.prepared)
            self.indices.append(index)
            self._watches.append(plan.watch)
            entries += [*places, *((vars(module), name, vars(module)[name]) for module in random for name in _RANDOM if name in vars(module))]
            hooked += hooks
            absent.append((vars(layer), "forward"))
            typed += random
        self._watches.append(dispatch.extension().Watch(entries=entries, absent=absent, empty=hooked, types=typed, tensors=[]))

    def holds(self) -> bool:
        return self._learned == learned() and dispatch.extension().Watch.all_hold(self._watches)


def _plan_and_chain(layer: "Qwen3VLTextDecoderLayer") -> tuple[Plan | None, Chain | None]:
    """The plan of a layer and its chain, if others follow it, as they are now."""
    plan = _plans.get(layer)
    if plan is not None and plan.chain is not None and plan.chain.holds():
        return plan, plan.chain
    plan = plan_of(layer)
    if plan is None or not watch_sees_dtypes():
        return plan, None
    chain = Chain(layer)
    plan.chain = chain if chain.layers else None
    return plan, plan.chain


class Qwen3VLTextDecoderLayer(stock.Qwen3VLTextDecoderLayer):
    def __call__(self, *args, **kwargs) -> Tensor:
        out = output_ahead(self, args, kwargs)
        return super().__call__(*args, **kwargs) if out is None else out

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
        ahead = look_ahead(cache, hidden_states)
        if ahead is not None:
            out = ahead.take(self, hidden_states, position_embeddings, attention_mask)
            if out is not None:
                return out
        if _call_is_plain(hidden_states, position_embeddings, attention_mask, kwargs):
            steps = self._steps(hidden_states, attention_mask, cache, ahead=ahead is not None)
            if steps:
                if hidden_states.is_cpu and hidden_states.shape[0] * hidden_states.shape[1] >= _LARGE:
                    pages.trim()  # else it adds up with the cache; milliseconds beside the tenths of a second of the layer
                outs = qvl_kernels.PreparedDecoderLayer.run(
                    [step.prepared for step in steps], hidden_states, *position_embeddings, [step.store.memory for step in steps],
                    past=steps[0].store.past, mask=attention_mask,
                )  # fmt: skip
                for step, out in zip(steps, outs):
                    step.out = out
                if ahead is not None:
                    return ahead.ran(steps, position_embeddings, attention_mask)
                steps[0].store.commit(hidden_states.shape[1])
                return outs[0]
        return super().forward(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )

    def _steps(self, x: Tensor, mask: Tensor | None, cache, *, ahead: bool) -> list[Step]:
        """This layer, and with ``ahead`` those that follow it, as fused calls that compute what their modules would; [] if it is none."""
        if torch.is_grad_enabled() and _any_requires_grad(x, self):
            return []
        plan, chain = _plan_and_chain(self) if ahead else (plan_of(self), None)
        if plan is None or plan.prepared.dtype is not x.dtype or not self.infers() or splits(self._modules["mlp"], x):
            return []
        layers, calls, indices = [self], [plan.prepared], [plan.attention.layer_idx]
        if chain is not None:
            layers, calls, indices = [self, *chain.layers], chain.calls, chain.indices
        stores = open_stores(cache, indices, x, plan.prepared.kv_heads, plan.prepared.head_dim)
        if not stores or not _causal_rule_holds(mask, x.shape[1], stores[0]):
            return []
        return [Step(layer, call, store) for layer, call, store in zip(layers, calls, stores)]

    def infers(self) -> bool:
        """Whether nothing in the layer is random now."""
        attention = self._modules["self_attn"]
        return not (attention.training and attention.attention_dropout > 0.0)

    def random_places(self) -> list[tuple[dict, str]]:
        """Where the modules are of which ``infers`` asks: dictionaries and names in them."""
        return [(self._modules, "self_attn")]


def _call_is_plain(x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, kwargs: dict) -> bool:
    """Whether fused calls take these arguments, whatever the layer."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # a trace would hold the results as constants
        and no_global_hooks()
        and x.dim() == 3
        and x.is_contiguous()
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype in (torch.bool, x.dtype)))
        and not has_special_arguments(kwargs)
        and tables_fit(tables, x)
        and kernels_take(x, *tables)
    )


def _any_requires_grad(x: Tensor, layer: nn.Module) -> bool:
    return x.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())


def _causal_rule_holds(mask: Tensor | None, queries: int, store: Store) -> bool:
    """Whether no mask, or this mask, means to sdpa what it means to ``decoder_layer`` with this cache."""
    keys = store.past + queries
    if mask is None:
        # sdpa sees the whole of what the cache returns, causal from the first key on.
        return (queries == 1 or store.past == 0) and (queries > 1 or store.visible_capacity == keys)
    return mask.shape[3] >= keys


def __getattr__(name: str):  # transformers looks functions up in the module of a class
    return getattr(stock, name)
