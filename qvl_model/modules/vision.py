"""The vision tower: one fused call per block at inference, op by op with gradients, else stock code."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

import qvl_kernels
from qvl_kernels.memory import pages
from qvl_kernels.quantization import QuantizedWeight
from qvl_model.modules.chunked_mlp import chunked, splits
from qvl_model.modules.fast_path import (
    FLASH,
    attends_as_stock,
    is_eligible,
    is_number,
    kernels_take,
    no_global_hooks,
    only_capture_hooks,
    stock_is_patched,
)
from qvl_model.modules.linear import LayerNorm, Linear
from qvl_model.quantization.modules import PackedLinear

__all__ = [
    "Qwen3VLVisionAttention",
    "Qwen3VLVisionBlock",
    "Qwen3VLVisionMLP",
    "Qwen3VLVisionPatchEmbed",
    "return_freed_memory",
    "is_gelu_tanh",
]

_GELU_TANH = "gelu_pytorch_tanh"
_LARGE = 4096  # patches: an image of 1,024 x 1,024 pixels


def return_freed_memory(visual: nn.Module, args: tuple, output: Any = None) -> None:
    """A hook before and after the tower that returns freed memory to the system (malloc_trim) if images are large, so
    that it does not add up with the tower's temporaries, nor those with the KV cache. The C library keeps freed tensors
    below 32 MB, which add up to some hundred MB. The call takes milliseconds, and the tower seconds.
    """
    pixels = args[0] if args else None
    if isinstance(pixels, Tensor) and pixels.is_cpu and pixels.shape[0] >= _LARGE and not torch.compiler.is_compiling():
        pages.return_freed_memory()


class Qwen3VLVisionPatchEmbed(stock.Qwen3VLVisionPatchEmbed):
    def forward(self, hidden_states: Tensor) -> Tensor:
        weight, bias = self.proj.weight, self.proj.bias
        patches = hidden_states.to(weight.dtype).reshape(-1, weight[0].numel())
        if (
            is_eligible(self.proj, nn.Conv3d)
            and no_global_hooks()
            and weight.is_contiguous()
            and kernels_take(patches, weight, bias)
        ):
            return qvl_kernels.patch_embed(patches, weight, bias)
        return super().forward(hidden_states)


class Qwen3VLVisionMLP(stock.Qwen3VLVisionMLP):
    def forward(self, hidden_state: Tensor) -> Tensor:
        return chunked(self, self._forward, hidden_state)

    def _forward(self, hidden_state: Tensor) -> Tensor:
        if stock_is_patched():
            return stock.Qwen3VLVisionMLP.forward(self, hidden_state)
        hidden_state = self.linear_fc1(hidden_state)
        if is_gelu_tanh(self.act_fn) and no_global_hooks() and kernels_take(hidden_state, cast=False):
            return self.linear_fc2(qvl_kernels.gelu_tanh(hidden_state))
        return self.linear_fc2(self.act_fn(hidden_state))


_GELU_TANH_CLASS = type(stock.ACT2FN[_GELU_TANH])


def is_gelu_tanh(activation: nn.Module) -> bool:
    return is_eligible(activation, _GELU_TANH_CLASS)


class Qwen3VLVisionAttention(stock.Qwen3VLVisionAttention):
    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        if (
            not _attention_is_eligible(self)
            or dropout > 0.0
            or not kernels_take(hidden_states, cast=False)
            or position_embeddings is None
            or torch.is_grad_enabled()
            and any(x.requires_grad for x in position_embeddings)  # the kernel gives them no gradient
        ):
            return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        tokens = hidden_states.shape[0]
        q, k, v = self.qkv(hidden_states).view(tokens, 3, self.num_heads, -1).unbind(1)
        q, k = qvl_kernels.vision_rope(q, k, *position_embeddings)
        out = qvl_kernels.attention(q, k, v, cu_seqlens=cu_seqlens.int().contiguous(), scale=self.scaling)
        return self.proj(out.reshape(tokens, -1))


def _attention_is_eligible(attention: nn.Module) -> bool:
    """Whether the kernels compute its attention function, with its heads and scale."""
    name = attention.config._attn_implementation
    return (
        name in ("sdpa", *FLASH)
        and attends_as_stock(name)
        and attention.num_key_value_groups == 1
        and is_number(attention.scaling)
    )


class Qwen3VLVisionBlock(stock.Qwen3VLVisionBlock):
    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        weights = self._fused_weights(hidden_states, position_embeddings)
        if weights is not None:
            return qvl_kernels.vision_block(
                hidden_states,
                weights,
                *position_embeddings,
                cu_seqlens.int().contiguous(),
                num_heads=self.attn.num_heads,
                eps=self.norm1.eps,
            )
        return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)

    def _fused_weights(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> qvl_kernels.VisionWeights | None:
        """The block's tensors if one fused call computes what its modules compute, else None."""
        attention, mlp = self.attn, self.mlp
        if (
            torch.compiler.is_compiling()
            or position_embeddings is None
            or position_embeddings[0].dtype is not torch.float32
            or type(attention) is not Qwen3VLVisionAttention
            or "forward" in attention.__dict__
            or not only_capture_hooks(attention, "attentions")
            or not _attention_is_eligible(attention)
            or (self.training and attention.attention_dropout > 0.0)
            or not is_eligible(mlp, Qwen3VLVisionMLP)
            or not is_gelu_tanh(mlp.act_fn)
            or not no_global_hooks()
            or hidden_states.numel() == 0
            or not hidden_states.is_contiguous()
            or splits(mlp, hidden_states)
            or attention.scaling != (hidden_states.shape[-1] // attention.num_heads) ** -0.5
        ):
            return None
        modules = (self.norm1, attention.qkv, attention.proj, self.norm2, mlp.linear_fc1, mlp.linear_fc2)
        for module in modules:
            kind = (
                LayerNorm
                if isinstance(module, nn.LayerNorm)
                else PackedLinear
                if type(module) is PackedLinear
                else Linear
            )
            if not is_eligible(module, kind):
                return None
        if not is_number(self.norm1.eps, self.norm2.eps) or self.norm1.eps != self.norm2.eps:
            return None
        weights = qvl_kernels.VisionWeights(
            *(
                tensor
                for m in modules
                for tensor in (
                    m.quantized if type(m) is PackedLinear else m._parameters.get("weight"),
                    m._parameters.get("bias"),
                )
            )
        )
        dense = [weight for weight in weights if not isinstance(weight, QuantizedWeight)]
        if any(weight is None for weight in dense) or not kernels_take(hidden_states, *dense):
            return None
        if torch.is_grad_enabled() and any(x.requires_grad for x in (hidden_states, *position_embeddings, *dense)):
            return None
        return weights


def __getattr__(name: str) -> Any:  # transformers looks functions up in the module of a class
    return getattr(stock, name)
