"""Weight formats: how int8 and int4 weights are stored. One layout for every backend, for decode and prefill, on disk
and in memory.

int8  symmetric, one fp32 scale per output row: w[n, k] = scales[n, 0] * values[n, k], values int8 in [-127, 127].
int4  symmetric, one bf16 scale per row and group of ``group`` inputs (32, 64 or 128): w[n, k] = scales[n, k // group] *
      (nibble - 8): zero-point 8, nibbles in [0, 15]. In each block of 32 inputs, byte j of 16 holds input j in its low
      and input j + 16 in its high nibble. K is padded with zeros to a whole number of groups.

On the CPU activations are rounded to int8 too, one scale per row and group of inputs: see ``quantize_activations``.
"""

from typing import NamedTuple

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
    scales: torch.Tensor  # fp32 [N, 1], or bf16 [N, K padded / group]
    in_features: int  # K

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def group(self) -> int:
        """Inputs per scale; K for int8."""
        return self.in_features if self.bits == 8 else 2 * self.values.shape[1] // max(1, self.scales.shape[1])


def quantize(weight: torch.Tensor, bits: int, group: int = 64) -> QuantizedWeight:
    """Rounds a floating-point weight [N, K] to ``bits`` (8 or 4), 4 in groups of ``group`` inputs.

    Raises: TypeError for other types; ValueError for other bits, groups or shapes, and for weights that are not finite.
    Example:
        >>> quantized = quantize(torch.randn(10, 64), bits=4, group=32)
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
    weight = weight.detach()  # quantised values have no gradient
    rows, size = weight.shape
    padded = -(-size // group) * group
    values = pages.empty(
        weight, *(((rows, size), torch.int8) if bits == 8 else ((rows, padded // 2), torch.uint8)), shared=True
    )
    scales = pages.empty(
        weight, *(((rows, 1), torch.float32) if bits == 8 else ((rows, padded // group), torch.bfloat16)), shared=True
    )
    step = max(1, CHUNK // max(1, size))
    for begin in range(0, rows, step):
        piece = slice(begin, begin + step)
        wide = weight[piece].float()
        if not bool(torch.isfinite(wide).all()):
            raise ValueError("quantize: weight has NaN or infinite elements")
        values[piece], scales[piece] = _quantize_int8(wide) if bits == 8 else _quantize_int4(wide, group)
    return QuantizedWeight(values, scales, size)


def _quantize_int8(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = _nonzero_scales(
        wide.abs().amax(1, keepdim=True) / 127.0 if wide.shape[1] else wide.new_ones(wide.shape[0], 1)
    )
    return torch.round(wide / scales).clamp_(-127, 127).to(torch.int8), scales


def _quantize_int4(wide: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = wide.shape
    padded = -(-size // group) * group
    wide = torch.nn.functional.pad(wide, (0, padded - size)).view(rows, padded // group, group)
    # The range is [-8, 7], so the extreme of larger magnitude is mapped to -8.
    low, high = (wide.amin(2), wide.amax(2)) if padded else (wide.new_zeros(rows, 0), wide.new_zeros(rows, 0))
    extreme = torch.where(-low > high, low, high)
    scales = _nonzero_scales(extreme / -8.0)
    scales = _nonzero_scales(scales * _least_squares_factor(wide / scales[..., None])).to(torch.bfloat16)
    values = (torch.round(wide / scales.float()[..., None]) + 8).clamp_(0, 15).to(torch.uint8)
    halves = values.view(rows, padded // BLOCK, 2, BLOCK // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).view(rows, padded // 2), scales


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
    values, scales, size = quantized
    if quantized.bits == 8:
        return (values.float() * scales).to(dtype)
    rows, padded = values.shape[0], 2 * values.shape[1]
    blocks = values.reshape(rows, padded // BLOCK, 1, BLOCK // 2)
    nibbles = torch.cat((blocks & 15, blocks >> 4), 2).view(rows, scales.shape[1], padded // max(1, scales.shape[1]))
    return ((nibbles.float() - 8) * scales.float()[..., None]).view(rows, padded)[:, :size].to(dtype)


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
    values, scales, size = weight
    # float64 scales serve the tests' fp64 reference; only the reference backend takes them
    checks.check_dtype(op, "weight.values", values, torch.int8, torch.uint8)
    checks.check_dtype(
        op, "weight.scales", scales, torch.float32 if values.dtype == torch.int8 else torch.bfloat16, torch.float64
    )
    for name, part in (("weight.values", values), ("weight.scales", scales)):
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
    checks.check_last_contiguous(op, values=values, scales=scales)
