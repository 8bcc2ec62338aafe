"""A decode step on the CPU: one call of the extension per run of consecutive decoder layers, and for norm and head."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from qvl_kernels import PreparedCache, PreparedDecoderLayer, dispatch, quantization
from qvl_kernels.ops.decoder_layer.prepared import Run
from qvl_kernels.ops.linear.extension import run_extension_linear
from qvl_kernels.ops.linear.selection import use_pytorch
from qvl_kernels.ops.linear.weights import extension_weight, out_features, tensors_of, unsupported_scales
from qvl_kernels.ops.rms_norm.cpu import rms_norm_cpu
from qvl_model.generation.inputs import body_why_not, cache_indices, token_embeddings
from qvl_model.generation.kv_cache import WriteSlots, reserve_slots
from qvl_model.modules.decoder_layer import fused_layer_of
from qvl_model.modules.fast_path import is_eligible, is_number, kernels_take, runs_library_code
from qvl_model.modules.lm_head import Linear
from qvl_model.modules.text import Qwen3VLTextRMSNorm
from qvl_model.quantization.modules import PackedLinear
from qvl_model.qvl.text import QVLTextModel

__all__ = ["CpuStep", "why_not"]

_ROOM = 256  # positions by which the attention mask grows
_COS_SIN_POSITIONS = 64  # positions whose cos and sin are computed at once, which takes as long as for one


def why_not(model: nn.Module) -> str | None:
    """Why the layers of a model are not eligible for one call as they are now, or None."""
    if dispatch.forced() not in (None, "cpp"):
        return f"the backend {dispatch.forced()} is forced"
    return body_why_not(model.model.language_model)


class CpuStep:
    """The decode steps of one call of ``generate``; see ``loop``. ``begin`` makes one.

    Args:
        model: one that ``why_not`` accepts.
        cache: keys and values of all tokens before the next one; a DynamicCache, or a StaticCache with room for all.
        positions: int64 [3, B, 1] (QVL: [B, 1]), of the next token.
        mask: bool [B, keys], the next token's key included: False at padding; None without padding.
        foreign: whether users' code may run between two tokens, or in hooks of modules. If so, nothing that it could
            change is kept, and modules are called as modules.
    Attributes:
        length: tokens in the cache.
    """

    def __init__(self, model: nn.Module, cache: Cache, positions: Tensor, mask: Tensor | None, foreign: bool) -> None:
        self._model, self._body, self._cache, self._foreign = model, model.model.language_model, cache, foreign
        self._positions, self._attention_mask = positions, None if mask is None else mask[:, None, None]
        self._cos, self._sin, self._next = None, None, 0
        few = self._positions.shape[-2] < PreparedDecoderLayer.ROWS
        self._end = None if foreign or not few else _End.of(self._body.norm, model.lm_head)
        self._layers = list(self._body.layers)
        self._calls, self._cache_indices = (
            [fused_layer_of(layer).handle for layer in self._layers],
            cache_indices(self._body),
        )
        # Keeps the memory that the calls read, if a weight's data is swapped meanwhile.
        self._alive = [
            x.detach()
            for call in self._calls
            for weight in call.weights
            if weight is not None
            for x in tensors_of(weight)
        ]
        self._slots: list[WriteSlots] = []
        self.length = int(cache.get_seq_length())

    @classmethod
    def begin(
        cls, model: nn.Module, cache: Cache, positions: Tensor, mask: Tensor | None, *, foreign: bool
    ) -> "CpuStep | None":
        """A step, or None if a layer of the cache has no write slots."""
        step = cls(model, cache, positions, mask, foreign)
        return step if step._open() else None

    def run(self, tokens: Tensor) -> Tensor | None:
        """The logits [B, V] after ``tokens`` int64 [B, 1]; None where a static cache is full."""
        if self.length == self._capacity and not self._open():
            return None
        hidden = token_embeddings(self._body, tokens)
        cos, sin = self._next_cos_sin(hidden)
        mask, past = self._mask(), self.length
        for layer, calls, memories, run in self._layer_runs:
            if layer is not None:
                hidden = layer.fuse(hidden, None, None, self._cache, False)
            if self._foreign:
                hidden = PreparedDecoderLayer.run(calls, hidden, cos, sin, memories, past=past, mask=mask)[-1]
            else:
                hidden = run(hidden, cos, sin, past=past, mask=mask)
        self.length += 1
        return self._logits(hidden)[:, -1]

    def check(self) -> bool:
        """Whether the model's layers are still those that this step runs."""
        same = (
            self._model.model.language_model is self._body
            and why_not(self._model) is None
            and cache_indices(self._body) == self._cache_indices
        )
        return same and all(fused_layer_of(layer).handle is call for layer, call in zip(self._body.layers, self._calls))

    def end(self, length: int) -> None:
        """Leaves the cache with the first ``length`` tokens, as stock code does."""
        for slots in self._slots:
            slots.commit(length - slots.past)

    def _open(self) -> bool:
        """Reserves write slots for the next tokens; False if the cache has none."""
        self.end(self.length)
        self._slots = []
        like = torch.empty(self._positions.shape[-2], 1, 0, dtype=self._calls[0].dtype, device=self._positions.device)
        reserved = [
            reserve_slots(self._cache, index, like, call.kv_heads, call.head_dim)
            for index, call in zip(self._cache_indices, self._calls)
        ]
        if any(slots is None or slots.past != self.length for slots in reserved):
            return False
        self._slots, self._capacity = reserved, min(slots.memory.capacity for slots in reserved)
        self._layer_runs = _layer_runs(self._layers, self._calls, [slots.memory for slots in reserved])
        return True

    def _next_cos_sin(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, 1, D] of the next position."""
        if self._cos is None or self._next == self._cos.shape[1]:
            several = not self._foreign and _positions_are_independent(self._body)
            count = _COS_SIN_POSITIONS if several else 1
            positions = self._positions + torch.arange(count, device=self._positions.device)
            self._cos, self._sin = self._body.rotary_emb(hidden, positions)
            self._positions, self._next = positions[..., -1:] + 1, 0
        at = self._next
        self._next += 1
        return self._cos[:, at : at + 1], self._sin[:, at : at + 1]

    def _logits(self, hidden: Tensor) -> Tensor:
        if self._end is not None and hidden.dtype is self._end.dtype:
            return self._end.logits(hidden)
        return self._model.lm_head(self._body.norm(hidden))

    def _mask(self) -> Tensor | None:
        if self._attention_mask is None:
            return None
        keys = self.length + 1
        if self._attention_mask.shape[3] < keys:
            self._attention_mask = nn.functional.pad(self._attention_mask, (0, _ROOM), value=True)
        return self._attention_mask[..., :keys]


def _layer_runs(layers: list, calls: list, memories: list[PreparedCache]) -> list[tuple]:
    """(layer that begins with cross-attention or None, calls, memories, Run of them) of each run of consecutive layers.
    A layer with cross-attention, or with other sizes, begins a new one.
    """
    found = []
    for layer, call, memory in zip(layers, calls, memories):
        fuses = getattr(layer, "fusion", None) is not None
        if fuses or not found or found[-1][1][-1].sizes != call.sizes:
            found.append((layer if fuses else None, [], []))
        found[-1][1].append(call)
        found[-1][2].append(memory)
    return [(*layer_run, Run(*layer_run[1:])) for layer_run in found]


def _positions_are_independent(body: nn.Module) -> bool:
    """Whether cos and sin of a position are independent of other positions; those of "dynamic" RoPE are not."""
    if isinstance(body, QVLTextModel):
        return runs_library_code(body, "rotary_emb")
    rotary = body.rotary_emb
    is_stock = type(rotary) is stock.Qwen3VLTextRotaryEmbedding and runs_library_code(rotary, "forward")
    return is_stock and rotary.rope_type == "default"


class _End:
    """Final norm and head, one call of the extension each. Keeps their weights alive."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        self._norm, self._eps, self.dtype = norm.weight.detach(), norm.variance_epsilon, norm.weight.dtype
        weight = head.quantized if type(head) is PackedLinear else head.weight.detach()
        self._alive = weight, head.bias
        self._weight, self._outputs = extension_weight(weight, head.bias), out_features(weight)

    @classmethod
    def of(cls, norm: nn.Module, head: nn.Module) -> "_End | None":
        """None if the modules are not eligible, the extension does not take their weights, or PyTorch's linear is
        faster.
        """
        if type(norm) is not Qwen3VLTextRMSNorm or type(head) not in (Linear, PackedLinear):
            return None
        if (
            not is_eligible(norm, type(norm))
            or not is_eligible(head, type(head))
            or not is_number(norm.variance_epsilon)
        ):
            return None
        if type(head) is Linear:
            sizes, fits = tuple(head.weight.shape), kernels_take(norm.weight, head.weight, head.bias)
        else:
            quantized = head.quantized
            quantization.check_weight("lm_head", quantized, norm.weight.device)
            sizes = out_features(quantized), quantized.in_features
            fits = kernels_take(norm.weight, head.bias) and unsupported_scales(quantized) is None
        fits = fits and sizes[1] == len(norm.weight) and (head.bias is None or head.bias.shape == sizes[:1])
        fits = fits and (type(head) is PackedLinear or not use_pytorch(norm.weight.dtype, 1, head.weight))
        return cls(norm, head) if fits else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, 1, V] of hidden [B, 1, C]."""
        return run_extension_linear(rms_norm_cpu(hidden, self._norm, self._eps), self._weight, self._outputs)
