"""Linear layers and tied embeddings whose weights are stored as int8 or int4."""

import torch
from torch import Tensor, nn

import qvl_kernels
from qvl_kernels import quant
from qvl_kernels.quant import QuantizedWeight
from qvl_model.modules.plain import autocast_dtype

__all__ = ["FORMATS", "PackedEmbedding", "PackedLinear"]

FORMATS = {"int8": 8, "int4": 4}  # name -> bits


class _Packed:
    """What packed modules share: buffers ``weight_values`` and ``weight_scales`` (see ``qvl_kernels.quant``) in place of ``weight``."""

    @property
    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(self.weight_values, self.weight_scales, self._inputs)

    @property
    def qweight(self) -> Tensor:
        """The values, under the name by which PEFT finds the device of a quantised layer."""
        return self.weight_values

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the module multiplies with."""
        return quant.dequantize(self.quantized, dtype)

    def _apply(self, fn, recurse=True):
        """Moves with ``.to(device)``; scales keep their dtype through ``.to(dtype)``, as integers do."""
        scales = self.weight_scales
        super()._apply(fn, recurse)
        if self.weight_scales.dtype != scales.dtype:
            self.weight_scales = scales.to(self.weight_scales.device)
        return self

    def _take(self, quantized: QuantizedWeight) -> None:
        self.register_parameter("weight", None)
        self.register_buffer("weight_values", quantized.values)
        self.register_buffer("weight_scales", quantized.scales)


class PackedLinear(_Packed, nn.Linear):
    """``nn.Linear`` with an int8 or int4 weight; the bias stays a parameter.

    Example:
        >>> packed = PackedLinear.from_linear(nn.Linear(64, 10), weights="int8")
        >>> y = packed(torch.randn(3, 64))
    """

    @property
    def _inputs(self) -> int:
        return self.in_features

    @classmethod
    def from_linear(cls, linear: nn.Linear, weights: str = "int8", *, group: int = 64) -> "PackedLinear":
        """A packed copy of ``linear``, which stays as it is (its bias is shared).

        Args:
            linear: any floating-point linear layer.
            weights: "int8" (a scale per row) or "int4" (a scale per row and ``group`` inputs).
            group: 32, 64 or 128.
        Raises: TypeError unless ``linear`` is an nn.Linear; ValueError for other formats or groups and weights that are not finite.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"PackedLinear.from_linear takes an nn.Linear, got {type(linear).__name__}")
        if weights not in FORMATS:
            raise ValueError(f"PackedLinear.from_linear: weights must be one of {', '.join(FORMATS)}, got {weights!r}")
        packed = cls.__new__(cls)
        nn.Module.__init__(packed)
        packed.in_features, packed.out_features, packed.training = linear.in_features, linear.out_features, linear.training
        packed._take(quant.quantize(linear.weight.detach(), FORMATS[weights], group))
        packed.register_parameter("bias", linear.bias)
        return packed

    @staticmethod
    def pack(linear: nn.Linear, quantized: QuantizedWeight) -> None:
        """Turns ``linear`` itself into a packed layer: hooks, names and references to it stay."""
        linear.__class__ = PackedLinear
        linear._take(quantized)

    def forward(self, input: Tensor) -> Tensor:
        lower = autocast_dtype(input.device)
        if lower is None:
            return qvl_kernels.quantized_linear(input.contiguous(), self.quantized, self.bias)
        bias = None if self.bias is None else self.bias.to(lower)
        with torch.autocast(input.device.type, enabled=False):
            return qvl_kernels.quantized_linear(input.to(lower).contiguous(), self.quantized, bias)

    def extra_repr(self) -> str:
        quantized = self.quantized
        return f"{super().extra_repr()}, int{quantized.bits}" + (f" in groups of {quantized.group}" if quantized.bits == 4 else "")


class PackedEmbedding(_Packed, nn.Embedding):
    """An embedding tied to a packed head: rows are looked up in the head's own values and scales."""

    @property
    def _inputs(self) -> int:
        return self.embedding_dim

    @staticmethod
    def pack(embedding: nn.Embedding, quantized: QuantizedWeight, dtype: torch.dtype) -> None:
        """Turns ``embedding`` itself into a packed one that gives rows in ``dtype``."""
        embedding.__class__ = PackedEmbedding
        embedding._take(quantized)
        # Empty: follows the model's dtype and device.
        embedding.register_buffer("rows_like", torch.empty(0, dtype=dtype, device=quantized.values.device), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        ids = input.reshape(-1)
        rows = QuantizedWeight(self.weight_values[ids], self.weight_scales[ids], self.embedding_dim)
        return quant.dequantize(rows, self.rows_like.dtype).view(*input.shape, self.embedding_dim)
