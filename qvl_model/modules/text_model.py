"""The language model: few tokens, as in decode, run through all of its layers in one call."""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from qvl_kernels import PreparedDecoderLayer
from qvl_model.compat import CACHE
from qvl_model.modules.decoder_layer import call_is_eligible, plain_fused_layer, run_fused
from qvl_model.modules.fast_path import is_eligible, masks_as_stock

__all__ = ["Qwen3VLTextModel"]


class Qwen3VLTextModel(stock.Qwen3VLTextModel):
    @functools.wraps(stock.Qwen3VLTextModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> tuple | BaseModelOutputWithPast:
        out = None if args else self._few_tokens(**kwargs)
        return super().forward(*args, **kwargs) if out is None else out

    def _few_tokens(
        self,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | None:
        """``forward`` of fewer tokens than a fused layer takes, after others in a KV cache; None where stock code must
        run. It does what stock's forward does before and after its loop over layers.
        """
        x, cache, config = inputs_embeds, kwargs.pop(CACHE, None), self.config
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or type(x) is not Tensor
            or x.dim() != 3
            or x.shape[0] * x.shape[1] >= PreparedDecoderLayer.ROWS
            or cache is None
            or any(value is not None for value in kwargs.values())
            or config.output_hidden_states
            or config.output_attentions
            or not getattr(config, "return_dict", True)
            or getattr(config, "is_causal", None) is not None
            or not is_eligible(self.rotary_emb, type(self.rotary_emb))
            or not masks_as_stock(config)
        ):
            return None
        layers, fused_layers = list(self.layers), []
        for layer in layers:  # the first that is not eligible decides: with adapters, each is judged again when it runs
            fused_layer = plain_fused_layer(layer, x.dtype)
            if fused_layer is None:
                return None
            fused_layers.append(fused_layer)
        if not layers or len({layer.self_attn.layer_idx for layer in layers}) < len(layers):
            return None
        positions, text_positions = _positions(position_ids, cache, x)
        mask = stock.create_causal_mask(
            config=config, inputs_embeds=x, attention_mask=attention_mask, **{CACHE: cache}, position_ids=text_positions
        )
        cos_sin = self.rotary_emb(x, positions)
        if not call_is_eligible(x, cos_sin, mask, {}):
            return None
        hidden = run_fused(layers, fused_layers, x, cos_sin, mask, text_positions, cache)
        if hidden is None:
            return None
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **{CACHE: cache})


def _positions(position_ids: Tensor | None, cache: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(rotary positions [3, B, T], text positions [B, T] for the mask or None), as stock's forward reads them."""
    batch, queries, _ = x.shape
    if position_ids is None:
        position_ids = (torch.arange(queries, device=x.device) + cache.get_seq_length()).view(1, 1, -1)
        position_ids = position_ids.expand(4, batch, -1)
    elif position_ids.dim() == 2:
        position_ids = position_ids[None].expand(4, *position_ids.shape)
    if position_ids.dim() == 3 and position_ids.shape[0] == 4:
        return position_ids[1:], position_ids[0]
    return position_ids, None


with torch.device("meta"):  # transformers records outputs of the classes that were constructed once
    Qwen3VLTextModel(
        Qwen3VLTextConfig(vocab_size=1, hidden_size=2, head_dim=2, num_hidden_layers=1, intermediate_size=1)
    )


def __getattr__(name: str) -> Any:  # transformers looks functions up in the module of a class
    return getattr(stock, name)
