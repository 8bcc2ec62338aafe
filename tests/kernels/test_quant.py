"""Weight formats: quantize on ordinary and awkward weights, and its error."""

import pytest
import torch

from qvl_kernels import quantization
from qvl_kernels.quantization import GROUPS, dequantize, quantize
from qvl_kernels.testing import random_tensor, relative_error


def _rand(rows, size, dtype=torch.float32):
    return random_tensor((rows, size), dtype, torch.Generator().manual_seed(0))


def _plain_int4(weight, group):
    """Baseline: the scale of each group maps its largest element to -8, so nothing is clipped."""
    wide = weight.unflatten(1, (-1, group))
    low, high = wide.amin(2, keepdim=True), wide.amax(2, keepdim=True)
    scales = (torch.where(-low > high, low, high) / -8).to(torch.bfloat16).float()
    return ((wide / scales).round().clamp(-8, 7) * scales).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_is_half_a_step_from_the_weight(dtype):
    weight = _rand(37, 75, dtype)
    quantized = quantize(weight, 8)
    assert quantized.values.dtype == torch.int8 and quantized.scales.shape == (37, 1) and quantized.group == 75
    step = weight.float().abs().amax(1, keepdim=True) / 127
    assert bool(((dequantize(quantized) - weight.float()).abs() <= step * 0.5001).all())


@pytest.mark.parametrize("group", GROUPS)
def test_int4_is_better_than_its_largest_elements(group):
    for weight, factor in ((_rand(50, 384), 0.97), (_rand(50, 384) ** 3, 0.99)):
        searched, plain = (
            relative_error(dequantize(quantize(weight, 4, group)), weight),
            relative_error(_plain_int4(weight, group), weight),
        )
        assert searched < factor * plain


def test_int4_layout():
    """Byte j of a block of 16 holds input j in its low and input j + 16 in its high nibble."""
    weight = torch.arange(-8, 8).float().repeat(2)[None] * 0.5  # exact with the scale 0.5
    weight[0, 16:] = weight[0, 16:].flip(0)
    values, scales, size = quantize(weight, 4, 32)
    assert size == 32 and scales.dtype == torch.bfloat16 and scales.tolist() == [[0.5]]
    assert (values[0] & 15).tolist() == list(range(16)) and (values[0] >> 4).tolist() == list(range(15, -1, -1))
    assert torch.equal(dequantize(quantize(weight, 4, 32)), weight)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (1, 1), (3, 31), (7, 130), (70000, 8)], ids=str)
def test_shapes(bits, shape):
    weight = _rand(*shape)
    quantized = quantize(weight, bits, 32)
    assert dequantize(quantized).shape == shape and dequantize(quantized, torch.bfloat16).dtype == torch.bfloat16
    if weight.numel():
        assert relative_error(dequantize(quantized), weight) < (0.01 if bits == 8 else 0.15)
        quantization.check_weight("test", quantized, torch.device("cpu"))
        part = quantize(weight[-1:], bits, 32)  # rows do not depend on the chunks in which they are quantised
        assert torch.equal(quantized.values[-1:], part.values) and torch.equal(quantized.scales[-1:], part.scales)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e30, 3e38])
def test_extreme_sizes_stay_finite(bits, size):
    weight = _rand(6, 64).clamp(-1, 1)
    weight *= size
    weight[2] = 0
    out = dequantize(quantize(weight, bits, 32))
    assert bool(torch.isfinite(out).all()) and not bool(out[2].any())
    if size > 1e-37:
        assert relative_error(out / size, weight / size) < (0.01 if bits == 8 else 0.15)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_outlier_coarsens_its_neighbours_only(bits):
    weight = _rand(4, 256)
    weight[1, 7] = 1e4
    out = dequantize(quantize(weight, bits, 64))
    touched = torch.zeros_like(weight, dtype=torch.bool)
    touched[1, : 256 if bits == 8 else 64] = True
    assert relative_error(out[~touched], weight[~touched]) < (0.01 if bits == 8 else 0.15)
    assert abs(out[1, 7] / 1e4 - 1) < 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_is_refused(bits, value):
    weight = _rand(3, 64)
    weight[2, 63] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight, bits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4), 8), "matrix"),
        ((torch.ones(4, 4, dtype=torch.int32), 8), "floating-point"),
        ((torch.ones(4, 4), 3), "8 or 4"),
        ((torch.ones(4, 4), 4, 16), "32, 64, 128"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(*arguments)
