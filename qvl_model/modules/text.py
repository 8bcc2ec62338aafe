"""Attention, MLP and norm of the text decoder, op by op: they run with gradients, and where a layer is not eligible
for one fused call.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

import qvl_kernels
from qvl_model.compat import takes_cache, update_cache
from qvl_model.modules.chunked_mlp import chunked
from qvl_model.modules.fast_path import (
    attends_as_stock,
    autocast_dtype,
    dropout_fits,
    is_eligible,
    is_number,
    kernels_take,
    mask_fits,
    no_global_hooks,
    stock_is_patched,
)

__all__ = [
    "Qwen3VLTextAttention",
    "Qwen3VLTextMLP",
    "Qwen3VLTextRMSNorm",
    "SILU",
    "has_special_arguments",
    "cos_sin_fit",
]

# Arguments of attention functions that change what attention computes; stock code serves them.
_SPECIAL_ARGUMENTS = (
    "is_causal",
    "position_bias",
    "cache",
    "softcap",
    "s_aux",
    "sliding_window",
    "block_table",
    "head_mask",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
)
SILU = type(stock.ACT2FN["silu"])


def has_special_arguments(kwargs: dict) -> bool:
    for name in kwargs:
        if name in _SPECIAL_ARGUMENTS and kwargs[name] is not None:
            return True
    return False


class Qwen3VLTextRMSNorm(stock.Qwen3VLTextRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if is_number(self.variance_epsilon) and kernels_take(hidden_states, self.weight, cast=False):
            return qvl_kernels.rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
        return super().forward(hidden_states)


class Qwen3VLTextMLP(stock.Qwen3VLTextMLP):
    def forward(self, x: Tensor) -> Tensor:
        return chunked(self, self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        if not (is_eligible(self.act_fn, SILU) and no_global_hooks()) or stock_is_patched():
            return stock.Qwen3VLTextMLP.forward(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if kernels_take(gate, up, cast=False):
            return self.down_proj(qvl_kernels.swiglu(gate, up))
        return self.down_proj(self.act_fn(gate) * up)


class Qwen3VLTextAttention(stock.Qwen3VLTextAttention):
    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.attention_dropout if self.training else 0.0
        lower = autocast_dtype(hidden_states.device)
        if (
            self.config._attn_implementation != "sdpa"
            or not attends_as_stock("sdpa")
            or not dropout_fits(dropout, hidden_states)
            or not self.is_causal
            or has_special_arguments(kwargs)
            or not (attention_mask is None or isinstance(attention_mask, Tensor))
            or not (is_eligible(self.q_norm, Qwen3VLTextRMSNorm) and is_eligible(self.k_norm, Qwen3VLTextRMSNorm))
            or not is_number(self.scaling, self.q_norm.variance_epsilon)
            or self.q_norm.variance_epsilon != self.k_norm.variance_epsilon
            or not no_global_hooks()
            or stock_is_patched()
            or not cos_sin_fit(position_embeddings, hidden_states)
            or lower is not None
            and position_embeddings[0].dtype not in (lower, torch.float32)
        ):
            return super().forward(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape)
        k = self.k_proj(hidden_states).view(shape)
        v = self.v_proj(hidden_states).view(shape)
        cos, sin = position_embeddings
        q_weight, k_weight = self.q_norm.weight, self.k_norm.weight
        if lower is not None and q.dtype != cos.dtype:  # projections came out in a lower dtype than cos, sin and norms
            q, k = q.to(cos.dtype), k.to(cos.dtype)
        learns_angles = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
        if not learns_angles and kernels_take(q, k, cos, sin, q_weight, k_weight, cast=False):
            q, k = qvl_kernels.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=self.q_norm.variance_epsilon)
        else:
            q, k = stock.apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), cos, sin, unsqueeze_dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = update_cache(cache, k, v, self.layer_idx, kwargs)
        if lower is not None:  # as sdpa under autocast
            q, k, v = q.to(lower), k.to(lower), v.to(lower)
        queries, keys = q.shape[2], k.shape[2]
        # Without a mask, sdpa aligns its causal mask at the first key, and ours at the last. T == S gives the same.
        fits = q.shape[1] == k.shape[1] * self.num_key_value_groups and mask_fits(attention_mask, q, k)
        if fits and kernels_take(q, k, v) and (attention_mask is not None or queries in (1, keys)):
            out = qvl_kernels.attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                causal=attention_mask is None and queries > 1,
                mask=attention_mask,
                scale=self.scaling,
                dropout_p=dropout,
            )
        else:
            attend = stock.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", stock.eager_attention_forward)
            out, _ = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(out), None


def cos_sin_fit(cos_sin: tuple[Tensor, Tensor], x: Tensor) -> bool:
    """Whether cos and sin are for exactly the positions of x [B, T, C]; stock code broadcasts other shapes."""
    shape = cos_sin[0].shape
    return len(shape) == 3 and shape[1] == x.shape[1] and shape[0] in (1, x.shape[0])


def __getattr__(name: str) -> Any:  # transformers looks functions up in the module of a class
    return getattr(stock, name)
