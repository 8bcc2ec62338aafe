"""Weight formats: how int8 and int4 weights are stored. One layout for every backend, for decode and prefill, on disk and in memory.

int8  symmetric, one fp32 scale per output row: w[n, k] = scales[n, 0] * values[n, k], values int8 in [-127, 127].
int4  symmetric, one bf16 scale per row and group of ``group`` inputs (32, 64 or 128): w[n, k] = scales[n, k // group] * (nibble - 8),
      nibbles in [0, 15]. In each block of 32 inputs, byte j of 16 holds input j in its low and input j + 16 in its high nibble.
      K is padded with zeros to a whole number of groups.

On the CPU activations are rounded to int8 too, one scale per row and group of inputs: see ``quantize_activations``.
"""

from typing import NamedTuple

import torch

from qvl_kernels import checks, pages

__all__ = [
    "GROUPS", "INT8_ACTIVATION_GROUP", "QuantizedWeight", "check_weight", "dequantize", "quantize", "quantize_activations", "rounded_activations",
]  # fmt: skip

GROUPS = (32, 64, 128)
INT8_ACTIVATION_GROUP = 128  # activations per scale with int8 weights; as csrc/cpu/kernel_table.h
TINY_ACTIVATION = 1e-30  # groups that stay below are zeros
BLOCK = 32
CHUNK = 1 << 18  # elements widened at once: no wide copy of a large weight is made, and these stay in the caches
SHRINKS = (0.8, 0.87, 0.94, 1.0)  # int4 ranges tried: 16 of them, from 0.6 to 1.15, would lower the error by another 1 %


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
        """Inputs per scale; all K for int8."""
        return self.in_features if self.bits == 8 else 2 * self.values.shape[1] // max(1, self.scales.shape[1])


def quantize(weight: torch.Tensor, bits: int, group: int = 64) -> QuantizedWeight:
    """Rounds a floating-point weight [N, K] to ``bits`` (8 or 4), 4 in groups of ``group`` inputs.

    Raises: ValueError for other bits, groups or shapes, and for weights that are not finite.
    Example:
        >>> quantized = quantize(torch.randn(10, 64), bits=4, group=32)
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"quantize: weight must be a floating-point matrix [N, K], got {weight.dtype} {tuple(weight.shape)}")
    if bits not in (8, 4):
        raise ValueError(f"quantize: bits must be 8 or 4, got {bits}")
    if bits == 4 and group not in GROUPS:
        raise ValueError(f"quantize: int4 groups have {', '.join(map(str, GROUPS))} inputs, got {group}")
    rows, size = weight.shape
    padded = -(-size // group) * group
    values = pages.empty(weight, *(((rows, size), torch.int8) if bits == 8 else ((rows, padded // 2), torch.uint8)), shared=True)
    scales = pages.empty(weight, *(((rows, 1), torch.float32) if bits == 8 else ((rows, padded // group), torch.bfloat16)), shared=True)
    step = max(1, CHUNK // max(1, size))
    for begin in range(0, rows, step):
        piece = slice(begin, begin + step)
        wide = weight[piece].float()
        if not bool(torch.isfinite(wide).all()):
            raise ValueError("quantize: weight has NaN or infinite elements")
        values[piece], scales[piece] = _int8(wide) if bits == 8 else _int4(wide, group)
    return QuantizedWeight(values, scales, size)


def _int8(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = _safe(wide.abs().amax(1, keepdim=True) / 127.0 if wide.shape[1] else wide.new_ones(wide.shape[0], 1))
    return torch.round(wide / scales).clamp_(-127, 127).to(torch.int8), scales


def _int4(wide: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = wide.shape
    padded = -(-size // group) * group
    wide = torch.nn.functional.pad(wide, (0, padded - size)).view(rows, padded // group, group)
    # The end of the range that is larger in magnitude becomes -8, which the other sign does not reach.
    low, high = (wide.amin(2), wide.amax(2)) if padded else (wide.new_zeros(rows, 0), wide.new_zeros(rows, 0))
    extreme = torch.where(-low > high, low, high)
    scales = _safe(extreme / -8.0)
    scales = _safe(scales * _least_squares(wide / scales[..., None])).to(torch.bfloat16)
    values = (torch.round(wide / scales.float()[..., None]) + 8).clamp_(0, 15).to(torch.uint8)
    halves = values.view(rows, padded // BLOCK, 2, BLOCK // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).view(rows, padded // 2), scales


def _least_squares(unit: torch.Tensor) -> torch.Tensor:
    """The factor of each group's scale that leaves the least squared error; ``unit`` [..., group] is in units of the scale.

    Rounded with each scale of SHRINKS, which clips the few largest, a group's best scale for the resulting integers q is
    <w, q> / <q, q>, and its error |w|^2 - <w, q>^2 / <q, q>        [range by squared error: arXiv:2106.08295, section 3.1]
    """
    best, factors = torch.zeros_like(unit[..., 0]), torch.ones_like(unit[..., 0])
    for shrink in SHRINKS:
        q = torch.round(unit / shrink).clamp_(-8, 7)
        product, square = (unit * q).sum(-1), (q * q).sum(-1)
        gain = product * product / square  # NaN for a group of zeros, which is no gain
        better = gain > best
        best, factors = torch.where(better, gain, best), torch.where(better, product / square, factors)
    return factors


def _safe(scales: torch.Tensor) -> torch.Tensor:
    """Rows and groups of zeros, and those too small for a normal number, get scale 1: their values are 0."""
    return torch.where(scales.abs() < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)


def dequantize(quantized: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N, K] in ``dtype``, the weight that a quantised linear layer multiplies with.

    Example:
        >>> weight = dequantize(quantize(torch.randn(10, 64), bits=8))
    """
    values, scales, size = quantized
    if quantized.bits == 8:
        return (values.float() * scales).to(dtype)
    rows = values.shape[0]
    padded = 2 * values.shape[1]
    blocks = values.reshape(rows, padded // BLOCK, 1, BLOCK // 2)
    nibbles = torch.cat((blocks & 15, blocks >> 4), 2).view(rows, scales.shape[1], padded // max(1, scales.shape[1]))
    return ((nibbles.float() - 8) * scales.float()[..., None]).view(rows, padded)[:, :size].to(dtype)


def quantize_activations(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] as int8 [..., K padded to whole groups] and fp32 scales [..., groups]: what the CPU kernels multiply.

    scale = max |x| / 127 of each group, values = round(x * 127 / max |x|). A group with an element that is not finite gets the
    scale NaN, one below 1e-30 is zeros. Groups keep an outlier from coarsening more than its neighbours.

    Example:
        >>> values, scales = quantize_activations(torch.randn(3, 100), 32)
    """
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    top = wide.abs().amax(-1)
    inverse = torch.where(top > TINY_ACTIVATION, top.new_tensor(127.0) / top, torch.zeros_like(top))
    values = torch.round(wide * inverse[..., None]).nan_to_num(0.0, 0.0, 0.0).to(torch.int8).flatten(-2)
    return values, torch.where(torch.isfinite(top), top / 127.0, torch.full_like(top, torch.nan))


def rounded_activations(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """x [..., K] as the CPU kernels see it when they multiply with ``weight``, in fp32.

    Example:
        >>> weight = quantize(torch.randn(10, 64), bits=8)
        >>> y = rounded_activations(torch.randn(3, 64), weight) @ dequantize(weight).T
    """
    group = INT8_ACTIVATION_GROUP if weight.bits == 8 else weight.group
    values, scales = quantize_activations(x, group)
    return (values.unflatten(-1, (-1, group)) * scales[..., None]).flatten(-2)[..., : x.shape[-1]]


def check_weight(op: str, weight: object, device: torch.device) -> None:
    """TypeError or ValueError unless ``weight`` is a well-formed QuantizedWeight on ``device``; its rows may be strided."""
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{op}: weight must be a quant.QuantizedWeight, got {type(weight).__name__}; see quant.quantize")
    values, scales, size = weight
    for name, part in (("values", values), ("scales", scales)):
        if not isinstance(part, torch.Tensor) or part.dim() != 2:
            raise TypeError(f"{op}: weight.{name} must be a matrix, got {getattr(part, 'shape', type(part).__name__)}")
        checks.check_device(op, f"weight.{name}", part, device)
    if size < 1:
        raise ValueError(f"{op}: weight must have at least 1 input, got {size}")
    # float64 scales are the tests' truth and taken by the reference only
    if values.dtype == torch.int8 and scales.dtype in (torch.float32, torch.float64):
        checks.check_shape(op, "weight.values", values, (values.shape[0], size))
        checks.check_shape(op, "weight.scales", scales, (values.shape[0], 1))
    elif values.dtype == torch.uint8 and scales.dtype in (torch.bfloat16, torch.float64):
        groups, rest = divmod(2 * values.shape[1], max(1, scales.shape[1]))
        if scales.shape[0] != values.shape[0] or rest or groups not in GROUPS or scales.shape[1] != -(-size // groups):
            raise ValueError(
                f"{op}: int4 values {tuple(values.shape)} and scales {tuple(scales.shape)} do not describe rows of {size}"
                f" inputs in groups of {', '.join(map(str, GROUPS))}"
            )
    else:
        raise TypeError(
            f"{op}: weight must be int8 values with fp32 scales or uint8 values with bf16 scales, got {values.dtype} and {scales.dtype}"
        )
    checks.check_last_contiguous(op, values=values, scales=scales)
