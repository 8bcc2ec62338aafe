"""Weight formats: how int8 and int4 weights are stored. One layout for every backend, for decode and prefill, on disk
and in memory.

int8  symmetric, one fp32 scale per output row: w[n, k] = scales[n, 0] * values[n, k], values int8 in [-127, 127].
int4  one bf16 or fp16 scale and one zero-point in [0, 15] per row and group of ``group`` inputs (32, 64 or 128):
      w[n, k] = scales[n, k // group] * (nibble - zero), nibbles in [0, 15]. Symmetric weights store no zero-points: all
      are 8.
      In each block of 32 inputs, byte j of 16 holds input j in its low and input j + 16 in its high nibble. Zero-points
      lie two in a byte, the even group's in the low nibble: 4 + 16 / 32 + 4 / 32 = 4.625 bits a weight in groups of 32.
      K is padded with zeros to a whole number of groups.

On the CPU activations are rounded to int8 too, one scale per row and group of inputs: see ``quantize_activations``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from qvl_kernels import checks
from qvl_kernels.memory import pages

__all__ = [
    "GROUPS",
    "INT8_ACTIVATION_GROUP",
    "QuantizedWeight",
    "check_weight",
    "dequantize",
    "quantize",
    "quantize_activations",
    "rounded_activations",
]

GROUPS = (32, 64, 128)
SCALE_DTYPES = (torch.bfloat16, torch.float16)  # of int4
ZERO = 8  # the zero-point of a symmetric int4 weight
INT8_ACTIVATION_GROUP = 128  # activations per scale with int8 weights; as csrc/cpu/kernel_table.h
TINY_ACTIVATION = 1e-30  # groups below this are quantised to zeros
BLOCK = 32
CHUNK = 1 << 18  # elements converted to fp32 at once: avoids an fp32 copy of a large weight, and they stay in cache
SHRINKS = (
    0.8,
    0.87,
    0.94,
    1.0,
)  # candidate int4 ranges; 16 of them, from 0.6 to 1.15, would lower the error by another 1 %


class QuantizedWeight(NamedTuple):
    """A weight [N, K] in a quantised format."""

    values: torch.Tensor  # int8 [N, K], or uint8 [N, K padded / 2]
    scales: torch.Tensor  # fp32 [N, 1], or bf16 or fp16 [N, groups] with groups = K padded / group
    in_features: int  # K
    zeros: torch.Tensor | None = None  # uint8 [N, groups / 2 rounded up]: int4 with zero-points, two in a byte

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def group(self) -> int:
        """Inputs per scale; K for int8."""
        return self.in_features if self.bits == 8 else 2 * self.values.shape[1] // max(1, self.scales.shape[1])

    @property
    def options(self) -> dict[str, Any]:
        """The arguments with which ``quantize`` makes a weight of this format."""
        if self.bits == 8:
            return {"bits": 8}
        zero_points = self.zeros is not None
        return {"bits": 4, "group": self.group, "zero_points": zero_points, "scale_dtype": self.scales.dtype}

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold the weight."""
        return (self.values, self.scales) if self.zeros is None else (self.values, self.scales, self.zeros)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "QuantizedWeight":
        """The weight whose tensors are ``function`` of these: another device, a copy, some of the rows."""
        zeros = None if self.zeros is None else function(self.zeros)
        return QuantizedWeight(function(self.values), function(self.scales), self.in_features, zeros)


def quantize(
    weight: torch.Tensor,
    bits: int,
    group: int = 64,
    *,
    zero_points: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantizedWeight:
    """Rounds a floating-point weight [N, K] to ``bits`` (8 or 4), 4 in groups of ``group`` inputs.

    Args:
        weight: floating-point [N, K].
        bits: 8 or 4. What follows is about 4.
        group: 32, 64 or 128.
        zero_points: a group's range is [min(w, 0), max(w, 0)], and 0 is exact; otherwise it is symmetric, of the least
            squared error.
        scale_dtype: bf16 or fp16. fp16 is more precise, and holds scales from 6e-8 to 65504.
    Raises: TypeError for other types; ValueError for other bits, groups or shapes, for weights that are not finite, and
    for scales beyond fp16.
    Example:
        >>> quantized = quantize(torch.randn(10, 64), bits=4, group=32, zero_points=True)
    """
    checks.check_kind("quantize", "weight", weight)
    if weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"quantize: weight must be a floating-point matrix [N, K] that holds values, got {weight.dtype} "
            f"{tuple(weight.shape)}"
        )
    if checks.check_int("quantize", "bits", bits, -(2**63)) not in (8, 4):
        raise ValueError(f"quantize: bits must be 8 or 4, got {bits}")
    if checks.check_int("quantize", "group", group, 1) not in GROUPS and bits == 4:
        raise ValueError(f"quantize: int4 groups have {', '.join(map(str, GROUPS))} inputs, got {group}")
    if not isinstance(zero_points, bool):
        raise TypeError(f"quantize: zero_points must be a bool, got {type(zero_points).__name__}")
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(f"quantize: scale_dtype must be torch.bfloat16 or torch.float16, got {scale_dtype!r}")
    if bits == 8 and (zero_points or scale_dtype is not torch.bfloat16):
        raise ValueError("quantize: int8 is symmetric with fp32 scales; zero_points and scale_dtype are of int4")
    weight = weight.detach()  # quantised values have no gradient
    rows, size = weight.shape
    groups = -(-size // group)
    values = pages.empty(
        weight, *(((rows, size), torch.int8) if bits == 8 else ((rows, groups * group // 2), torch.uint8)), shared=True
    )
    scales = pages.empty(
        weight, *(((rows, 1), torch.float32) if bits == 8 else ((rows, groups), scale_dtype)), shared=True
    )
    zeros = pages.empty(weight, (rows, -(-groups // 2)), torch.uint8, shared=True) if zero_points else None
    step = max(1, CHUNK // max(1, size))
    for begin in range(0, rows, step):
        piece = slice(begin, begin + step)
        wide = weight[piece].float()
        if not bool(torch.isfinite(wide).all()):
            raise ValueError("quantize: weight has NaN or infinite elements")
        if bits == 8:
            values[piece], scales[piece] = _quantize_int8(wide)
        elif zeros is None:
            values[piece], scales[piece] = _quantize_int4(wide, group, scale_dtype)
        else:
            values[piece], scales[piece], zeros[piece] = _quantize_int4_range(wide, group, scale_dtype)
    return QuantizedWeight(values, scales, size, zeros)


def from_integers(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> QuantizedWeight:
    """The int4 weight ``scales * (values - zeros)`` of these integers.

    Args:
        values: uint8 [N, K], 0 to 15, K a whole number of groups of 32, 64 or 128 inputs.
        scales: bf16 or fp16 [N, groups].
        zeros: uint8 [N, groups], 0 to 15; None for 8 everywhere.
    Raises: TypeError for other dtypes; ValueError for other shapes or integers.
    Example:
        >>> weight = from_integers(torch.randint(16, (10, 64), dtype=torch.uint8), torch.rand(10, 2).half())
    """
    checks.check_dtype("from_integers", "values", values, torch.uint8)
    checks.check_dtype("from_integers", "scales", scales, *SCALE_DTYPES)
    if values.dim() != 2 or scales.dim() != 2 or values.shape[0] != scales.shape[0]:
        raise ValueError(
            f"from_integers: values must be [N, K] and scales [N, groups], got {tuple(values.shape)} and "
            f"{tuple(scales.shape)}"
        )
    rows, groups = scales.shape
    if not any(groups * group == values.shape[1] for group in GROUPS):
        raise ValueError(
            f"from_integers: {values.shape[1]} inputs are no {groups} groups of {', '.join(map(str, GROUPS))}"
        )
    if zeros is not None:
        checks.check_dtype("from_integers", "zeros", zeros, torch.uint8)
        checks.check_shape("from_integers", "zeros", zeros, (rows, groups))
    for name, integers in (("values", values), ("zeros", zeros)):
        if integers is not None and integers.numel() and int(integers.max()) > 15:
            raise ValueError(f"from_integers: {name} must be 0 to 15, got {int(integers.max())}")
    nibbles = values.contiguous().view(rows, groups, -1)
    packed = None if zeros is None else _packed_zeros(zeros.contiguous())
    return QuantizedWeight(_packed_values(nibbles), scales, values.shape[1], packed)


def _quantize_int8(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = _nonzero_scales(
        wide.abs().amax(1, keepdim=True) / 127.0 if wide.shape[1] else wide.new_ones(wide.shape[0], 1)
    )
    return torch.round(wide / scales).clamp_(-127, 127).to(torch.int8), scales


def _quantize_int4(wide: torch.Tensor, group: int, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    wide, low, high = _in_groups(wide, group)
    # The range is [-8, 7], so the extreme of larger magnitude is mapped to -8.
    extreme = torch.where(-low > high, low, high)
    scales = _nonzero_scales(extreme / -8.0)
    scales = _stored_scales(scales * _least_squares_factor(wide / scales[..., None]), scale_dtype)
    values = (torch.round(wide / scales.float()[..., None]) + ZERO).clamp_(0, 15).to(torch.uint8)
    return _packed_values(values), scales


def _quantize_int4_range(
    wide: torch.Tensor, group: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With zero-points: the range from the smallest to the largest weight, and 0, in 15 steps. Steps are rounded down,
    so that all 16 values are in use: quantising the result once more gives the same.
    """
    wide, low, high = _in_groups(wide, group)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scales = _stored_scales(high / 15.0 - low / 15.0, scale_dtype, down=True)
    zeros = torch.floor(-low / scales.float() + 0.5).clamp_(0, 15)
    values = torch.round(wide / scales.float()[..., None] + zeros[..., None]).clamp_(0, 15).to(torch.uint8)
    return _packed_values(values), scales, _packed_zeros(zeros.to(torch.uint8))


def _in_groups(wide: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weight as [N, groups, group], padded with zeros, and the least and the largest of each group."""
    rows, size = wide.shape
    groups = -(-size // group)
    wide = torch.nn.functional.pad(wide, (0, groups * group - size)).view(rows, groups, group)
    return (wide, wide.amin(2), wide.amax(2)) if groups else (wide, wide.new_zeros(rows, 0), wide.new_zeros(rows, 0))


def _packed_values(nibbles: torch.Tensor) -> torch.Tensor:
    """Nibbles [N, groups, group] as bytes [N, K padded / 2]."""
    rows, padded = nibbles.shape[0], nibbles.shape[1] * nibbles.shape[2]
    halves = nibbles.view(rows, padded // BLOCK, 2, BLOCK // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).view(rows, padded // 2)


def _packed_zeros(zeros: torch.Tensor) -> torch.Tensor:
    """Zero-points [N, groups] as bytes [N, groups / 2 rounded up]."""
    pairs = torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2)).view(zeros.shape[0], -(-zeros.shape[1] // 2), 2)
    return pairs[:, :, 0] | pairs[:, :, 1] << 4


def _zero_points(quantized: QuantizedWeight) -> torch.Tensor | int:
    """The zero-points [N, groups, 1] in fp32 of an int4 weight, or the one of all its groups."""
    zeros = quantized.zeros
    if zeros is None:
        return ZERO
    pairs = torch.stack((zeros & 15, zeros >> 4), 2).flatten(1)
    return pairs[:, : quantized.scales.shape[1], None].float()


def _least_squares_factor(unit: torch.Tensor) -> torch.Tensor:
    """The factor on each group's scale with the least squared error; ``unit`` [..., group] is weight / scale.

    For each candidate of SHRINKS, which clips the few largest weights, q are the rounded integers. Their best scale is
    <w, q> / <q, q>, with error |w|^2 - <w, q>^2 / <q, q>        [range by squared error: arXiv:2106.08295, section 3.1]
    """
    best, factors = torch.zeros_like(unit[..., 0]), torch.ones_like(unit[..., 0])
    for shrink in SHRINKS:
        q = torch.round(unit / shrink).clamp_(-8, 7)
        product, square = (unit * q).sum(-1), (q * q).sum(-1)
        gain = product * product / square  # NaN for a group of zeros, which compares as no gain
        better = gain > best
        best, factors = torch.where(better, gain, best), torch.where(better, product / square, factors)
    return factors


def _nonzero_scales(scales: torch.Tensor) -> torch.Tensor:
    """Replaces scales that are zero or subnormal by 1: the values of such rows and groups are 0."""
    return torch.where(scales.abs() < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)


def _stored_scales(scales: torch.Tensor, dtype: torch.dtype, down: bool = False) -> torch.Tensor:
    """Nonzero scales in ``dtype``, rounded to the nearest, or positive ones ``down``, but for a rounding error of fp32;
    those below fp16's range become 1 as well.
    """
    scales = _nonzero_scales(scales)
    stored = scales.to(dtype)
    if down:
        above = (stored.float() > scales * (1 + 1e-6)) & (stored >= torch.finfo(dtype).tiny) & stored.isfinite()
        stored = (stored.view(torch.int16) - above.to(torch.int16)).view(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"quantize: the weight's scales are beyond {dtype}; take torch.bfloat16")
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def dequantize(quantized: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The dense weight [N, K] in ``dtype`` that a quantised linear layer multiplies with.

    Raises: TypeError or ValueError for a weight that is not well-formed, or a dtype that is not floating-point.
    Example:
        >>> weight = dequantize(quantize(torch.randn(10, 64), bits=8))
    """
    _check_format("dequantize", quantized, None, 0)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dequantize: dtype must be a floating-point torch.dtype, got {dtype!r}")
    return _dequantize(quantized, dtype)


def _dequantize(quantized: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    values, scales, size, _ = quantized
    if quantized.bits == 8:
        return (values.float() * scales).to(dtype)
    rows, padded = values.shape[0], 2 * values.shape[1]
    blocks = values.reshape(rows, padded // BLOCK, 1, BLOCK // 2)
    nibbles = torch.cat((blocks & 15, blocks >> 4), 2).view(rows, scales.shape[1], padded // max(1, scales.shape[1]))
    wide = (nibbles.float() - _zero_points(quantized)) * scales.float()[..., None]
    return wide.view(rows, padded)[:, :size].to(dtype)


def quantize_activations(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] as int8 [..., K padded to whole groups] and fp32 scales [..., groups], as the CPU kernels multiply it.

    scale = max |x| / 127 of each group, values = round(x * 127 / max |x|). A group with an element that is not finite
    gets the scale NaN; a group below 1e-30 becomes zeros. With groups, an outlier coarsens only its own group.

    Raises: TypeError or ValueError unless x is a floating-point tensor of at least 1 input and group at least 1.
    Example:
        >>> values, scales = quantize_activations(torch.randn(3, 100), 32)
    """
    checks.check_tensor("quantize_activations", "x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"quantize_activations: x must have at least 1 input, got shape {tuple(x.shape)}")
    group = checks.check_int("quantize_activations", "group", group, 1, 2**31)
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    absmax = wide.abs().amax(-1)
    inverse = torch.where(absmax > TINY_ACTIVATION, absmax.new_tensor(127.0) / absmax, torch.zeros_like(absmax))
    values = torch.round(wide * inverse[..., None]).nan_to_num(0.0, 0.0, 0.0).to(torch.int8).flatten(-2)
    return values, torch.where(torch.isfinite(absmax), absmax / 127.0, torch.full_like(absmax, torch.nan))


def rounded_activations(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """x [..., K] after the int8 rounding of the CPU kernels that multiply with ``weight``, in fp32.

    Raises: TypeError or ValueError for a weight that is not well-formed, or an x that does not fit it.
    Example:
        >>> weight = quantize(torch.randn(10, 64), bits=8)
        >>> y = rounded_activations(torch.randn(3, 64), weight) @ dequantize(weight).T
    """
    checks.check_tensor("rounded_activations", "x", x)
    check_weight("rounded_activations", weight, x.device)
    if x.shape[-1:] != (weight.in_features,):
        raise ValueError(
            f"rounded_activations: x must have the {weight.in_features} inputs of weight, got shape {tuple(x.shape)}"
        )
    group = INT8_ACTIVATION_GROUP if weight.bits == 8 else weight.group
    values, scales = quantize_activations(x, group)
    return (values.unflatten(-1, (-1, group)) * scales[..., None]).flatten(-2)[..., : x.shape[-1]]


def check_weight(op: str, weight: object, device: torch.device | None = None) -> None:
    """TypeError or ValueError unless ``weight`` is a well-formed QuantizedWeight of at least 1 input, on ``device`` if
    given; its rows may be strided.

    Example:
        >>> check_weight("my_layer", quantize(torch.randn(10, 64), bits=8), torch.device("cpu"))
    """
    if not isinstance(op, str):
        raise TypeError(f"check_weight: op must be the name of the caller, got {type(op).__name__}")
    if device is not None and not isinstance(device, torch.device):
        raise TypeError(f"{op}: device must be a torch.device, got {type(device).__name__}")
    _check_format(op, weight, device, 1)


def _check_format(op: str, weight: object, device: torch.device | None, least: int) -> None:
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(
            f"{op}: weight must be a quant.QuantizedWeight, got {type(weight).__name__}; see quant.quantize"
        )
    values, scales, size, zeros = weight
    # float64 scales serve the tests' fp64 reference; only the reference backend takes them
    checks.check_dtype(op, "weight.values", values, torch.int8, torch.uint8)
    scale_dtypes = (torch.float32,) if values.dtype == torch.int8 else SCALE_DTYPES
    checks.check_dtype(op, "weight.scales", scales, *scale_dtypes, torch.float64)
    parts = [("weight.values", values), ("weight.scales", scales)]
    if zeros is not None:
        checks.check_dtype(op, "weight.zeros", zeros, torch.uint8)
        if values.dtype == torch.int8:
            raise ValueError(f"{op}: int8 weights have no zero-points; weight.zeros must be None")
        parts.append(("weight.zeros", zeros))
    for name, part in parts:
        if part.dim() != 2:
            raise ValueError(f"{op}: {name} must be a matrix, got shape {tuple(part.shape)}")
        checks.check_device(op, name, part, values.device if device is None else device)
    checks.check_int(op, "weight.in_features", size, least)
    if values.dtype == torch.int8:
        checks.check_shape(op, "weight.values", values, (values.shape[0], size))
        checks.check_shape(op, "weight.scales", scales, (values.shape[0], 1))
    else:
        count, padded = scales.shape[1], 2 * values.shape[1]
        fits = (
            any(count * group == padded and padded - group < size <= padded for group in GROUPS)
            if size
            else padded == count == 0
        )
        if scales.shape[0] != values.shape[0] or not fits:
            raise ValueError(
                f"{op}: int4 values {tuple(values.shape)} and scales {tuple(scales.shape)} do not describe rows of "
                f"{size}"
                f" inputs in groups of {', '.join(map(str, GROUPS))}"
            )
        if zeros is not None:
            checks.check_shape(op, "weight.zeros", zeros, (values.shape[0], -(-count // 2)))
    checks.check_last_contiguous(op, values=values, scales=scales, zeros=zeros)
