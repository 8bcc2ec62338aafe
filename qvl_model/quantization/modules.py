"""Linear layers and tied embeddings with quantised (int8, int4) weights."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

import qvl_kernels
from qvl_kernels import quantization
from qvl_kernels.ops.quantized_linear.embedding import embedding_rows
from qvl_kernels.quantization import QuantizedWeight
from qvl_model.modules.fast_path import autocast_dtype
from qvl_model.quantization.weight import TAKEN_OUT, DequantizedWeight, Kept, copied_to_train, merge_in_progress

__all__ = ["FORMATS", "PackedEmbedding", "PackedLinear"]

FORMATS = {"int8": 8, "int4": 4}  # name -> bits

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object  # subclasses of _Quantised bring nn.Linear or nn.Embedding


class _Quantised(_Module):
    """Base of quantised modules: buffers ``weight_values``, ``weight_scales`` and, with zero-points, ``weight_zeros``
    (see ``qvl_kernels.quantization``) in place of ``weight``.

    The parameter ``weight`` is empty, [N, 0], and in no state_dict. It follows the model's dtype and device. PEFT finds
    the number of rows in its shape, and tied modules by its identity.
    """

    weight_values: Tensor
    weight_scales: Tensor
    weight_zeros: Tensor | None
    was_trained: bool
    _kept: Kept

    @property
    def _inputs(self) -> int:
        """The second size of the weight, of the subclass."""
        raise NotImplementedError

    @property
    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(self.weight_values, self.weight_scales, self._inputs, self.weight_zeros)

    @property
    def weight(self) -> DequantizedWeight:
        """The weight [N, K] in the model's dtype: dequantised where it is read, quantised again where it is written."""
        # nn.Parameter returns a tensor of the class that it is given, which a type checker cannot know.
        return nn.Parameter(DequantizedWeight(self), requires_grad=False)  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        """Setting ``weight`` to a parameter turns the module back into a dense one; setting it to the weight of another
        quantised module ties the two.
        """
        if name != "weight":
            super().__setattr__(name, value)
        elif isinstance(value, DequantizedWeight):
            self._share(cast(_Quantised, value.module))
        elif isinstance(value, nn.Parameter):
            self.make_dense(value)
        else:
            raise TypeError(
                f"the weight of a quantised layer takes an nn.Parameter, got {type(value).__name__}; write other "
                f"values to weight.data"
            )

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise TypeError(TAKEN_OUT)
        super().__delattr__(name)

    def __deepcopy__(self, memo: dict) -> nn.Module:
        """A quantised copy, or a dense one if an adapter trains it in place of the original (``modules_to_save``)."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        if copied_to_train(self):
            copied.make_dense(nn.Parameter(copied.dequantize(copied.weight.dtype)))
        return copied

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantised weight [N, K], which the module multiplies with."""
        return quantization.dequantize(self.quantized, dtype)

    @torch.no_grad()
    def requantize(self, weight: Tensor) -> None:
        """Quantises ``weight`` [N, K] in the module's format; unchanged rows stay as they are, bit for bit.

        The weight before a merge of an adapter is kept, and put back when the adapter is unmerged.
        Raises: ValueError for another K and weights that are not finite; RuntimeError for an unmerge without a kept
        weight.
        """
        old = self.quantized
        if weight.dim() != 2 or weight.shape[1] != old.in_features:
            shape = list(weight.shape)
            raise ValueError(
                f"the weight of this quantised layer takes shape [N, {old.in_features}], got {shape}; replace the "
                f"layer instead"
            )
        merge = merge_in_progress(self)
        if merge is not None and merge.undone:
            original = self._kept.undo(merge)
            if original is not None:
                return self._replace(original)
        new = quantization.quantize(weight, **old.options)
        rows = min(len(old.values), len(new.values))
        same = (self.dequantize(weight.dtype)[:rows] == weight[:rows]).all(1).nonzero()[:, 0]
        for stored, kept in zip(new.tensors, old.tensors):
            stored[same] = kept[same]
        if merge is None or merge.for_good:
            self._kept.forget()
        elif not merge.undone:
            self._kept.keep(merge, old)
        self._replace(new)

    def _replace(self, new: QuantizedWeight) -> None:
        """Writes in place where shapes are equal, so that tied modules change too."""
        if new.values.shape == self.weight_values.shape:
            for stored, tensor in zip(self.quantized.tensors, new.tensors):
                stored.copy_(tensor)
        else:
            self.weight_values, self.weight_scales, self.weight_zeros = new.values, new.scales, new.zeros
            empty = self._parameters["weight"].new_empty(len(new.values), 0)  # type: ignore[union-attr]  # is never None
            self._parameters["weight"] = nn.Parameter(empty, requires_grad=False)

    def _share(self, other: "_Quantised") -> None:
        """Ties this module to ``other``."""
        self.weight_values, self.weight_scales = other.weight_values, other.weight_scales
        self.weight_zeros, self._kept = other.weight_zeros, other._kept
        self._parameters["weight"] = other._parameters["weight"]

    def make_dense(self, weight: nn.Parameter) -> None:
        """Turns the module itself back into a dense one with ``weight``; hooks, names and references to it stay."""
        del self.weight_values, self.weight_scales, self.weight_zeros, self._kept, self.was_trained
        module: nn.Module = self
        module.__class__ = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
        module.weight = weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with ``.to(device)``; scales keep their dtype under ``.to(dtype)``, as integer values do."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]

    def _load_from_state_dict(self, *args: Any) -> None:
        weight, self._parameters["weight"] = self._parameters["weight"], None
        super()._load_from_state_dict(*args)
        self._parameters["weight"] = weight

    def _take(self, quantized: QuantizedWeight, weight: Tensor) -> None:
        """Puts ``quantized`` in place of ``weight``."""
        empty = torch.empty(weight.shape[0], 0, dtype=weight.dtype, device=quantized.values.device)
        self._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
        self.register_buffer("weight_values", quantized.values)
        self.register_buffer("weight_scales", quantized.scales)
        self.register_buffer("weight_zeros", quantized.zeros)  # None is in no state_dict
        self._kept = Kept()
        self.was_trained = weight.requires_grad


class PackedLinear(_Quantised, nn.Linear):  # type: ignore[misc]  # weight is a property in place of a parameter
    """``nn.Linear`` with an int8 or int4 weight; the bias stays a parameter.

    Example:
        >>> layer = PackedLinear.from_linear(nn.Linear(64, 10), weights="int8")
        >>> y = layer(torch.randn(3, 64))
    """

    def __init__(self, *_: object, **__: object) -> None:
        raise TypeError("PackedLinear has no weights of its own to begin with; make it with PackedLinear.from_linear")

    @property
    def _inputs(self) -> int:
        return self.in_features

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weights: str = "int8",
        *,
        group: int = 64,
        zero_points: bool = False,
        scale_dtype: torch.dtype = torch.bfloat16,
    ) -> "PackedLinear":
        """A quantised copy of ``linear``, which stays as it is. The bias is shared.

        Args:
            linear: any floating-point linear layer.
            weights: "int8" (a scale per row) or "int4" (a scale per row and ``group`` inputs).
            group: 32, 64 or 128.
            zero_points, scale_dtype: of "int4", as ``qvl_kernels.quantization.quantize`` takes them.
        Raises: TypeError unless ``linear`` is an nn.Linear; ValueError for other formats or groups and weights that are
        not finite.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"PackedLinear.from_linear takes an nn.Linear, got {type(linear).__name__}")
        if weights not in FORMATS:
            raise ValueError(f"PackedLinear.from_linear: weights must be one of {', '.join(FORMATS)}, got {weights!r}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features, layer.training = (
            linear.in_features,
            linear.out_features,
            linear.training,
        )
        quantized = quantization.quantize(
            linear.weight.detach(), FORMATS[weights], group, zero_points=zero_points, scale_dtype=scale_dtype
        )
        layer._take(quantized, linear.weight)
        layer.register_parameter("bias", linear.bias)
        return layer

    @staticmethod
    def convert(linear: nn.Linear, quantized: QuantizedWeight) -> None:
        """Turns ``linear`` itself into a quantised layer; hooks, names and references to it stay."""
        weight = linear.weight
        linear.__class__ = PackedLinear
        cast(PackedLinear, linear)._take(quantized, weight)

    def forward(self, input: Tensor) -> Tensor:
        lower = autocast_dtype(input.device)
        if lower is None:
            return qvl_kernels.quantized_linear(input.contiguous(), self.quantized, self.bias)
        bias = None if self.bias is None else self.bias.to(lower)
        with torch.autocast(input.device.type, enabled=False):
            return qvl_kernels.quantized_linear(input.to(lower).contiguous(), self.quantized, bias)

    def extra_repr(self) -> str:
        quantized = self.quantized
        groups = f" in groups of {quantized.group}" if quantized.bits == 4 else ""
        zeros = "" if quantized.zeros is None else " with zero-points"
        return f"{super().extra_repr()}, int{quantized.bits}{groups}{zeros}"


class PackedEmbedding(_Quantised, nn.Embedding):  # type: ignore[misc]  # likewise
    """An embedding tied to a quantised head: rows are looked up in the head's quantised weight."""

    @property
    def _inputs(self) -> int:
        return self.embedding_dim

    @staticmethod
    def convert(embedding: nn.Embedding, quantized: QuantizedWeight) -> None:
        """Turns ``embedding`` itself into a quantised one that returns rows in the dtype of its weight."""
        weight = embedding.weight
        embedding.__class__ = PackedEmbedding
        cast(PackedEmbedding, embedding)._take(quantized, weight)

    def forward(self, input: Tensor) -> Tensor:
        dtype = self._parameters["weight"].dtype  # type: ignore[union-attr]  # is never None
        rows = embedding_rows(self.quantized, input.reshape(-1), dtype)
        return rows.view(*input.shape, self.embedding_dim)
