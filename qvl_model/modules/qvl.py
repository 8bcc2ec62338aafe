"""Subclasses of QVL's plain modules that call the kernels, under the names of the plain classes. For what QVL shares
with Qwen3-VL (attention, MLPs, norms, linear layers) see the other files of ``qvl_model.modules``.
"""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

import qvl_kernels
from qvl_model.compat import CACHE, takes_cache
from qvl_model.modules.decoder_layer import Qwen3VLTextDecoderLayer
from qvl_model.modules.fast_path import (
    attends_as_stock,
    dropout_fits,
    is_eligible,
    is_number,
    kernels_take,
    no_global_hooks,
)
from qvl_model.modules.vision import Qwen3VLVisionBlock, is_gelu_tanh
from qvl_model.qvl import connector, text, vision

__all__ = [
    "QVLConnectorAttention",
    "QVLConnectorMLP",
    "QVLCrossAttention",
    "QVLDecoderLayer",
    "QVLPatchEmbed",
    "QVLVisionBlock",
    "REPLACEMENTS",
]


class QVLDecoderLayer(Qwen3VLTextDecoderLayer, text.QVLDecoderLayer):
    """Cross-attention op by op, then the rest of the layer as one fused call if it is eligible."""

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
        visual: text.Visual | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        hidden_states = self.fuse(hidden_states, visual_tokens, visual, cache, output_attentions)
        return super().forward(
            hidden_states,
            position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            fuse=False,
            output_attentions=output_attentions,
            **kwargs,
        )

    def is_deterministic(self) -> bool:
        dropout = self._modules["dropout"]
        return (
            is_eligible(dropout, nn.Dropout)
            and not (dropout.training and dropout.p > 0.0)
            and super().is_deterministic()
        )


class QVLCrossAttention(text.QVLCrossAttention):
    def read(self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dropout = self.attention_dropout if self.training else 0.0
        if not _is_eligible_sdpa(self, q, keys) or not dropout_fits(dropout, q) or not kernels_take(q, keys, values):
            return super().read(q, keys, values, lengths)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        return qvl_kernels.cross_attention(q, k, v, kv_lens=lengths, scale=self.scaling, dropout_p=dropout), None


class QVLConnectorAttention(connector.QVLConnectorAttention):
    def read(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        if not _is_eligible_sdpa(self, q, k.transpose(1, 2)) or not kernels_take(q, k, v):
            return super().read(q, k, v, lengths)
        return qvl_kernels.cross_attention(q, k, v, kv_lens=lengths, scale=self.scaling)


def _is_eligible_sdpa(attention: nn.Module, q: Tensor, keys: Tensor) -> bool:
    """Whether attention of q [B, T, H, D] over keys [B, Hkv, S, D] is transformers' sdpa, and its settings fit."""
    return (
        attention.config._attn_implementation == "sdpa"
        and attends_as_stock("sdpa")
        and is_number(attention.scaling)
        and q.shape[2] == keys.shape[1] * attention.num_key_value_groups
    )


class QVLConnectorMLP(connector.QVLConnectorMLP):
    def forward(self, x: Tensor) -> Tensor:
        wide = self.fc1(x)
        if is_gelu_tanh(self.act_fn) and no_global_hooks() and kernels_take(wide):
            return self.fc2(qvl_kernels.gelu_tanh(wide))
        return self.fc2(self.act_fn(wide))


class QVLVisionBlock(Qwen3VLVisionBlock, vision.QVLVisionBlock):
    """One fused call if the block is eligible, as in Qwen3-VL."""


class QVLPatchEmbed(vision.QVLPatchEmbed):
    """The convolution as a matmul over patches."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        weight, bias, patch = self.proj.weight, self.proj.bias, self.patch_size
        if not (is_eligible(self.proj, nn.Conv2d) and no_global_hooks() and weight.is_contiguous()):
            return super().forward(pixel_values)
        images, channels, height, width = pixel_values.shape
        rows, columns = height // patch, width // patch
        patches = pixel_values.to(weight.dtype).reshape(images, channels, rows, patch, columns, patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(images * rows * columns, -1)
        if not kernels_take(patches, weight, bias):
            return super().forward(pixel_values)
        return qvl_kernels.patch_embed(patches, weight.unsqueeze(2), bias).view(images, rows, columns, -1)


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    text.QVLDecoderLayer: QVLDecoderLayer,
    text.QVLCrossAttention: QVLCrossAttention,
    connector.QVLConnectorAttention: QVLConnectorAttention,
    connector.QVLConnectorMLP: QVLConnectorMLP,
    vision.QVLVisionBlock: QVLVisionBlock,
    vision.QVLPatchEmbed: QVLPatchEmbed,
}
