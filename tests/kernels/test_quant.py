"""Weight formats: quantize on ordinary and awkward weights, and its error."""

import pytest
import torch
from weight_formats import FORMATS

import qvl_kernels
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
    values, scales, size, zeros = quantize(weight, 4, 32)
    assert size == 32 and zeros is None and scales.dtype == torch.bfloat16 and scales.tolist() == [[0.5]]
    assert (values[0] & 15).tolist() == list(range(16)) and (values[0] >> 4).tolist() == list(range(15, -1, -1))
    assert torch.equal(dequantize(quantize(weight, 4, 32)), weight)


def test_int4_layout_with_zero_points():
    """Byte g of a row holds the zero-point of group 2 g in its low and that of group 2 g + 1 in its high nibble."""
    weight = torch.stack([torch.arange(16.0).repeat(2) - zero for zero in (3, 0, 15)]).view(1, 96) * 0.25
    quantized = quantize(weight, 4, 32, zero_points=True)
    assert quantized.scales.tolist() == [[0.25] * 3] and quantized.zeros.tolist() == [[0x03, 0x0F]]
    assert quantized.zeros.dtype == torch.uint8 and quantized.values.shape == (1, 48)
    assert (quantized.values[0, :16] & 15).tolist() == list(range(16))
    assert torch.equal(dequantize(quantized), weight)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_zero_points_are_half_a_step_from_the_weight(group, scale_dtype):
    """A group whose weights all have one sign has its range begin at 0, and 0 is exact."""
    weight = _rand(40, 384)
    weight[10:20] = weight[10:20].abs() + 1
    weight[20:30] = -weight[20:30].abs() * 1e-3
    weight[:, ::7] = 0
    quantized = quantize(weight, 4, group, zero_points=True, scale_dtype=scale_dtype)
    assert quantized.scales.dtype == scale_dtype and quantized.group == group and quantized.bits == 4
    out, parts = dequantize(quantized), weight.unflatten(1, (-1, group))
    step = (parts.amax(2).clamp_min(0) - parts.amin(2).clamp_max(0)) / 15
    worst = (out - weight).abs().unflatten(1, (-1, group)).amax(2) / step
    # a scale is rounded down to 8 or 11 bits, which moves the end of the range by up to 15 / 2^7 or 15 / 2^10 of a step
    assert worst.max() <= 0.5 + 15 * torch.finfo(scale_dtype).eps
    assert not out[:, ::7].any()
    again = quantize(out, **quantized.options)
    assert all(torch.equal(*pair) for pair in zip(again.tensors, quantized.tensors, strict=True))


def test_zero_points_are_better_than_symmetry_where_weights_are_not_symmetric():
    weight = _rand(50, 384) + 1
    errors = [relative_error(dequantize(quantize(weight, 4, 32, zero_points=zeros)), weight) for zeros in (True, False)]
    assert errors[0] < 0.8 * errors[1]


def test_fp16_scales_are_more_precise():
    weight = _rand(50, 384)
    errors = [
        relative_error(dequantize(quantize(weight, 4, 32, scale_dtype=dtype)), weight)
        for dtype in (torch.float16, torch.bfloat16)
    ]
    assert errors[0] < errors[1]


def test_fp16_scales_at_the_ends_of_their_range():
    weight = _rand(3, 64)
    weight[1] *= 1e-12
    for zero_points in (True, False):
        out = dequantize(quantize(weight, 4, 64, zero_points=zero_points, scale_dtype=torch.float16))
        assert not out[1].any() and relative_error(out[::2], weight[::2]) < 0.15
        with pytest.raises(ValueError, match="beyond torch.float16"):
            quantize(weight * 1e8, 4, 64, zero_points=zero_points, scale_dtype=torch.float16)


@pytest.mark.parametrize(("bits", "group", "options"), FORMATS)
def test_options_make_the_same_format(bits, group, options):
    weight = _rand(9, 200)
    quantized = quantize(weight, bits, group, **options)
    again = quantize(weight[:4], **quantized.options)
    assert len(again.tensors) == len(quantized.tensors) == 2 + bool(options.get("zero_points"))
    for ours, theirs in zip(again.tensors, quantized.tensors):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs[:4])


@pytest.mark.parametrize(("bits", "options"), [(8, {}), (4, {}), (4, {"zero_points": True})])
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (1, 1), (3, 31), (7, 130), (70000, 8)], ids=str)
def test_shapes(bits, options, shape):
    weight = _rand(*shape)
    quantized = quantize(weight, bits, 32, **options)
    assert dequantize(quantized).shape == shape and dequantize(quantized, torch.bfloat16).dtype == torch.bfloat16
    if weight.numel():
        assert relative_error(dequantize(quantized), weight) < (0.01 if bits == 8 else 0.15)
        quantization.check_weight("test", quantized, torch.device("cpu"))
        part = quantize(weight[-1:], bits, 32, **options)  # rows do not depend on the chunks that they lie in
        assert all(torch.equal(whole[-1:], alone) for whole, alone in zip(quantized.tensors, part.tensors))


@pytest.mark.parametrize(("bits", "options"), [(8, {}), (4, {}), (4, {"zero_points": True})])
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e30, 3e38])
def test_extreme_sizes_stay_finite(bits, options, size):
    weight = _rand(6, 64).clamp(-1, 1)
    weight *= size
    weight[2] = 0
    out = dequantize(quantize(weight, bits, 32, **options))
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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 8, "zero_points": True}, ValueError, "int8 is symmetric"),
        ({"bits": 8, "scale_dtype": torch.float16}, ValueError, "int8 is symmetric"),
        ({"bits": 4, "zero_points": 1}, TypeError, "bool"),
        ({"bits": 4, "scale_dtype": torch.float32}, TypeError, "scale_dtype"),
        ({"bits": 4, "scale_dtype": "float16"}, TypeError, "scale_dtype"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        quantize(torch.ones(4, 64), **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"zeros": torch.zeros(5, 1)}, TypeError, r"weight\.zeros must be a tensor of uint8"),
        ({"zeros": [0]}, TypeError, r"weight\.zeros"),
        ({"zeros": torch.zeros(5, 3, dtype=torch.uint8)}, ValueError, r"weight\.zeros"),
        ({"zeros": torch.zeros(4, 2, dtype=torch.uint8)}, ValueError, r"weight\.zeros"),
        ({"zeros": torch.zeros(2, dtype=torch.uint8)}, ValueError, r"weight\.zeros must be a matrix"),
        ({"zeros": torch.zeros(2, 5, dtype=torch.uint8).T}, ValueError, "contiguous"),
        ({"zeros": torch.zeros(5, 2, dtype=torch.uint8, device="meta")}, ValueError, r"weight\.zeros"),
        ({"scales": torch.ones(5, 3)}, TypeError, r"weight\.scales"),
    ],
)
def test_malformed_zero_points_are_refused(change, error, message):
    weight = quantize(_rand(5, 96), 4, 32, zero_points=True)
    with pytest.raises(error, match=message):
        quantization.check_weight("test", weight._replace(**change), torch.device("cpu"))
    with pytest.raises(error, match=message):
        qvl_kernels.quantized_linear(torch.ones(2, 96), weight._replace(**change))
    int8 = quantize(_rand(5, 96), 8)
    with pytest.raises(ValueError, match="no zero-points"):
        quantization.check_weight("test", int8._replace(zeros=weight.zeros))
