"""Input scales: each channel x_k that quantised layers read is divided by s_k, and their columns multiplied by it.

    W x = (W diag(s)) (diag(1/s) x)

The division costs nothing where it is folded into what makes the channel: the weight and bias of a norm, or the scales
of the rows of a quantised layer. The scales are kept in each layer that reads the channels, in the fp32 buffer
``folded_scales`` [K]. An adapter would see the divided inputs, so that a layer which is put into another module is
unfolded first: it is then a ``ScaledLinear``, which divides its input itself, and norms and weights are those of the
dense model again, to the rounding of their dtype.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from qvl_model.quantization.modules import PackedLinear
from qvl_model.qvl.connector import QVLAttentionConnector, QVLConnectorLayer
from qvl_model.qvl.modeling import QVLModel
from qvl_model.qvl.text import QVLCrossAttention, QVLFusion

__all__ = [
    "BUFFERS",
    "Fold",
    "ScaledLinear",
    "attach",
    "folds_of",
    "forget",
    "load",
    "put",
    "records_of",
    "representable",
    "scales_of",
    "sources_of",
    "unfolded",
]

FOLDED, EXPLICIT = BUFFERS = ("folded_scales", "input_scales")
_RECORDS = "_qvl_folds"  # attribute of the modules of folds


class Fold(NamedTuple):
    """Channels, what makes them and what reads them, by the names of modules.

    Attributes:
        source: norm or linear layer; channel c is its output ``offset + c``.
        readers: linear layers that read the channels and nothing else; all have the same inputs.
        index: int64 [K], the channel that each of their inputs is.
        offset: first output of the source that is a channel.
    """

    source: str
    readers: tuple[str, ...]
    index: Tensor
    offset: int = 0


def folds_of(modules: Mapping[str, nn.Module]) -> list[Fold]:
    """All folds of a model whose modules, by name, these are: see the table in docs/quantization.md."""
    found: list[Fold] = []
    for name, module in modules.items():
        for source, readers, repeats, tiles, offset in _channels(module):
            names = tuple(f"{name}.{reader}" if name else reader for reader in readers)
            source = f"{name}.{source}" if name else source
            present = [modules.get(one) for one in (source, *names)]
            if all(isinstance(one, nn.Module) for one in present):
                found.append(Fold(source, names, _index(present[1].in_features, repeats, tiles), offset))
    return found


def _index(inputs: int, repeats: tuple[int, int], tiles: int) -> Tensor:
    """The channel of each input: heads of ``repeats[1]`` channels stand ``repeats[0]`` times each, and all of that
    ``tiles`` times.
    """
    count, width = repeats
    channels = torch.arange(inputs // tiles // count)
    return channels.view(-1, 1, width).expand(-1, count, -1).flatten().repeat(tiles)


def _channels(module: nn.Module) -> Iterator[tuple[str, tuple[str, ...], tuple[int, int], int, int]]:
    """(source, readers, (times each head is read, width of a head), tiles, offset) of folds inside ``module``."""
    plain = (1, 1)
    if isinstance(module, stock.Qwen3VLTextDecoderLayer):
        yield "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), plain, 1, 0
        yield "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), plain, 1, 0
        yield "mlp.up_proj", ("mlp.down_proj",), plain, 1, 0
    elif isinstance(module, stock.Qwen3VLTextAttention | QVLCrossAttention):
        yield "v_proj", ("o_proj",), (module.num_key_value_groups, module.head_dim), 1, 0
    elif isinstance(module, stock.Qwen3VLVisionBlock):
        width = module.attn.num_heads * module.attn.head_dim
        yield "norm1", ("attn.qkv",), plain, 1, 0
        yield "attn.qkv", ("attn.proj",), plain, 1, 2 * width
        yield "norm2", ("mlp.linear_fc1",), plain, 1, 0
    elif isinstance(module, stock.Qwen3VLVisionPatchMerger):
        yield "norm", ("linear_fc1",), plain, module.hidden_size // module.norm.normalized_shape[0], 0
    elif isinstance(module, QVLFusion):
        yield "norm", ("attn.q_proj",), plain, 1, 0
    elif isinstance(module, QVLConnectorLayer):
        yield "norm1", ("attn.q_proj",), plain, 1, 0
        yield "attn.v_proj", ("attn.o_proj",), plain, 1, 0
        yield "norm2", ("mlp.fc1",), plain, 1, 0
    elif isinstance(module, QVLModel):
        if isinstance(module.connector, QVLAttentionConnector):
            layers = range(len(module.connector.layers))
            readers = tuple(f"connector.layers.{i}.attn.{name}_proj" for i in layers for name in "kv")
        else:
            readers = ("connector.mlp.fc1",)
        yield "visual.norm", readers, plain, 1, 0


class ScaledLinear(PackedLinear):
    """A quantised layer that divides its input itself; ``weight`` is the weight of the dense model."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * self.input_scales.reciprocal().to(input.dtype))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (super().dequantize() / self.input_scales.float()).to(dtype)

    @torch.no_grad()
    def requantize(self, weight: Tensor) -> None:
        if weight.dim() == 2 and weight.shape[1] == self.in_features:  # anything else is refused below
            kept = self.dequantize(weight.dtype)
            rows = min(len(kept), len(weight))
            same = (kept[:rows] == weight[:rows]).all(1).nonzero()[:, 0]
            weight = weight.float() * self.input_scales
            weight[same] = super().dequantize()[same]  # bit for bit, so that these rows stay as they are
        self.__class__ = PackedLinear  # which compares with the multiplied weight that it holds
        try:
            self.requantize(weight)
        finally:
            self.__class__ = ScaledLinear

    def make_dense(self, weight: nn.Parameter) -> None:
        del self.input_scales
        self.__dict__.pop(_RECORDS, None)
        super().make_dense(weight)


class _Record:
    """A fold of one model: its modules, which it does not keep alive, and the rest of ``Fold``."""

    def __init__(self, source: nn.Module, readers: list[nn.Module], index: Tensor, offset: int) -> None:
        self.__setstate__({"source": source, "readers": readers, "index": index, "offset": offset})
        for module in (source, *readers):
            module.__dict__.setdefault(_RECORDS, []).append(self)

    def __getstate__(self) -> dict[str, Any]:
        readers = [reader() for reader in self.readers]
        return {"source": self.source(), "readers": readers, "index": self.index, "offset": self.offset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.source, *self.readers = (_reference(module) for module in (state["source"], *state["readers"]))
        self.index, self.offset = state["index"], state["offset"]
        if not _watching:  # also in a process that only loads a pickled model
            _watching.append(nn_module.register_module_module_registration_hook(_registered))

    def folded(self) -> bool:
        readers = self._alive()
        return bool(readers) and all(FOLDED in reader._buffers for reader in readers)

    def can_fold(self, wrapped: set[int]) -> bool:
        """Whether it is unfolded, and no adapter is around its modules (``wrapped``, ids) any more."""
        modules = [self.source(), *(reference() for reference in self.readers)]
        unfolded = all(reader is not None and EXPLICIT in reader._buffers for reader in modules[1:])
        return unfolded and modules[0] is not None and not any(id(module) in wrapped for module in modules)

    def _alive(self) -> list[nn.Module]:
        return [reader for reference in self.readers if (reader := reference()) is not None]

    def unfold(self) -> Callable[[], None]:
        """Norms and rows are the dense model's again, and readers divide. Returns what undoes it bit for bit."""
        readers, source = self._alive(), self.source()
        scales, undo = readers[0]._buffers[FOLDED], []
        for reader in readers:
            reader.register_buffer(EXPLICIT, reader._buffers.pop(FOLDED))
            if isinstance(reader, PackedLinear):
                reader.__class__ = ScaledLinear
            else:  # it got another, dense weight since then
                undo.append((reader.weight, reader.weight.detach().clone()))
                reader.weight.data.div_(reader._buffers.pop(EXPLICIT).to(reader.weight.dtype))
        if source is not None:  # a copy of one layer alone has lost the others
            undo += [(tensor, tensor.detach().clone()) for tensor in _outputs(source)]
            self._multiply(source, self._channels(scales))

        def fold() -> None:
            for reader in readers:
                reader._buffers.pop(EXPLICIT, None)
                reader.register_buffer(FOLDED, scales)
                if isinstance(reader, PackedLinear):
                    reader.__class__ = PackedLinear
            for tensor, value in undo:
                tensor.data.copy_(value)

        return fold

    def fold(self) -> None:
        """Divides the source; readers no longer divide."""
        for reader in self._alive():
            scales = reader._buffers.pop(EXPLICIT)
            reader.register_buffer(FOLDED, scales)
            reader.__class__ = PackedLinear
        self._multiply(self.source(), self._channels(scales).reciprocal())

    def _channels(self, scales: Tensor) -> Tensor:
        channels = scales.new_ones(int(self.index.max()) + 1)
        channels[self.index.to(channels.device)] = scales
        return channels

    @torch.no_grad()
    def _multiply(self, source: nn.Module, channels: Tensor) -> None:
        for tensor in _outputs(source):
            part = tensor[self.offset : self.offset + len(channels)]
            factor = channels.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1))
            part.copy_(part.float() * factor)


def _outputs(source: nn.Module) -> list[Tensor]:
    """The tensors of a norm or linear layer that have one entry, or row, per output and scale it."""
    scales = source.weight_scales if isinstance(source, PackedLinear) else source.weight
    bias = getattr(source, "bias", None)
    return [scales] if bias is None else [scales, bias]


def representable(source: nn.Module, scales: Tensor) -> Tensor:
    """Scales [C] close to these, by which dividing the weight of a norm in 16 bits leaves no rounding error."""
    if isinstance(source, nn.Linear):
        return scales
    weight = source.weight.detach().cpu()
    divided = (weight.float() / scales).to(weight.dtype).float()
    return torch.where(divided != 0, weight.float() / divided, scales)


def _reference(module: nn.Module | None) -> Callable[[], nn.Module | None]:
    return _nothing if module is None else weakref.ref(module)


def _nothing() -> None:
    return None


_watching: list[Any] = []


def _registered(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Unfolds a layer or norm that is put into another module: adapters wrap layers that way."""
    if module is not None:
        for record in module.__dict__.get(_RECORDS, ()):
            if record.folded():
                record.unfold()


def put(modules: Mapping[str, nn.Module], scales: Mapping[str, Tensor]) -> None:
    """Keeps the scales of readers, by name, in their quantised layers, whose columns were multiplied: they divide their
    inputs until their records are folded.
    """
    for one in folds_of(modules):
        if one.readers[0] not in scales:
            continue
        readers = [modules[name] for name in one.readers]
        for name, reader in zip(one.readers, readers):
            reader.register_buffer(EXPLICIT, scales[name].to(reader.weight_values.device))
            reader.__class__ = ScaledLinear
        _Record(modules[one.source], readers, one.index, one.offset)


def load(layer: PackedLinear, scales: Mapping[str, Tensor]) -> None:
    """Takes the scales of a layer, by their name in ``BUFFERS``, from a file.

    Raises: ValueError unless they are fp32 [K].
    """
    for name, value in scales.items():
        if value.dtype != torch.float32 or value.shape != (layer.in_features,):
            raise ValueError(f"{name} must be fp32 [{layer.in_features}], got {value.dtype} {list(value.shape)}")
        layer.register_buffer(name, value)
        if name == EXPLICIT:
            layer.__class__ = ScaledLinear


def attach(modules: Mapping[str, nn.Module]) -> None:
    """Makes the records of a model that was loaded, whose layers have their scales."""
    for one in folds_of(modules):
        readers = [modules[name] for name in one.readers]
        if all(any(name in reader._buffers for name in BUFFERS) for reader in readers):
            _Record(modules[one.source], readers, one.index, one.offset)


def records_of(model: nn.Module) -> list[_Record]:
    found = {id(record): record for module in model.modules() for record in module.__dict__.get(_RECORDS, ())}
    return list(found.values())


def forget(model: nn.Module) -> None:
    """Drops the records of a model whose layers are dense again."""
    for module in model.modules():
        module.__dict__.pop(_RECORDS, None)


@contextmanager
def unfolded(model: nn.Module) -> Iterator[None]:
    """Unfolds all layers; folds them again, bit for bit, if the block raises."""
    undo = [record.unfold() for record in records_of(model) if record.folded()]
    try:
        yield
    except BaseException:
        for fold_again in reversed(undo):
            fold_again()
        raise


def scales_of(layer: nn.Module) -> Tensor | None:
    """The input scales [K] of a layer, or None."""
    return next((layer._buffers[name] for name in BUFFERS if name in layer._buffers), None)


def sources_of(model: nn.Module) -> set[int]:
    """Ids of the modules into which something was folded."""
    return {id(record.source()) for record in records_of(model)}
