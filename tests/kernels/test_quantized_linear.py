"""quantized_linear on the CPU against fake-quantised weights and activations, and with special inputs."""

import pytest
import torch
from bounds import norm_error
from quantized_numbers import as_multiplied
from weight_formats import FORMATS

import qvl_kernels
from qvl_kernels import quantization
from qvl_kernels.ops.vision_block.cases import CASES as VISION_CASES
from qvl_kernels.ops.vision_block.unfused import unfused_vision_block
from qvl_kernels.testing import random_tensor, relative_error, surrounded

SIZES = [
    (1, 1, 1),
    (1, 9, 127),
    (2, 5, 128),
    (3, 4, 129),
    (4, 37, 300),
    (5, 6, 64),
    (7, 3, 31),
    (8, 8, 256),
    (13, 11, 161),
    (16, 10, 384),
    (17, 5, 200),
    (40, 33, 96),
]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _golden(x: torch.Tensor, weight: quantization.QuantizedWeight) -> torch.Tensor:
    x, dense = as_multiplied(x, weight)
    return x @ dense.T


@pytest.mark.parametrize(("bits", "group", "options"), FORMATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_product_of_rounded_numbers(bits, group, options, size):
    (m, n, k), generator = size, _generator()
    weight = quantization.quantize(random_tensor((n, k), torch.float32, generator), bits, group, **options)
    x = random_tensor((m, k + 3), torch.float32, generator)[:, 3:]
    x[0, k // 2] = 100.0  # an outlier affects its group only
    weight = weight.apply(surrounded)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x_typed = surrounded(x.to(dtype))
        assert relative_error(qvl_kernels.quantized_linear(x_typed, weight), _golden(x_typed, weight)) <= norm_error(
            dtype, -(-k // group)
        )


@pytest.mark.parametrize(("bits", "group", "options"), FORMATS)
def test_an_outlier_coarsens_its_own_group_only(bits, group, options):
    generator, k = _generator(), 512
    weight = quantization.quantize(random_tensor((32, k), torch.float32, generator), bits, group, **options)
    x = random_tensor((4, k), torch.float32, generator)
    x[:, 7] = 1e4
    without = x.clone()
    without[:, :128] = 0.0  # the widest group
    difference = qvl_kernels.quantized_linear(x, weight) - qvl_kernels.quantized_linear(x - without, weight)
    assert relative_error(difference, without @ quantization.dequantize(weight).T) < 0.02


@pytest.mark.parametrize(("bits", "group", "options"), FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 20])
def test_rows_that_are_not_finite_are_nan_and_alone(bits, group, options, bad, rows):
    generator = _generator()
    weight = quantization.quantize(random_tensor((9, 150), torch.float32, generator), bits, group, **options)
    x = random_tensor((rows, 150), torch.float32, generator)
    clean = qvl_kernels.quantized_linear(x, weight)
    x[rows - 1, 140] = bad
    out = qvl_kernels.quantized_linear(x, weight)
    assert out[-1].isnan().all() and torch.equal(out[:-1], clean[:-1])


@pytest.mark.parametrize(("bits", "group", "options"), FORMATS)
def test_weights_at_the_ends_of_the_range(bits, group, options):
    generator = _generator()
    wide = random_tensor((6, 200), torch.float32, generator)
    wide[0] = 0.0
    wide[1] = 1e-40  # denormal
    wide[2, 3] = 1e4 if options.get("scale_dtype") is torch.float16 else 1e30
    wide[3] = wide[3].sign()  # every value at the end of the range
    weight = quantization.quantize(wide, bits, group, **options)
    x = random_tensor((5, 200), torch.float32, generator)
    x[1], x[2], x[3] = x[1] * 1e-20, 0.0, x[3].sign()
    out, golden = qvl_kernels.quantized_linear(x, weight), _golden(x, weight)
    assert not out[:, 0].any() and not out[2].any()
    for row in (0, 1, 3, 4):
        for column in (2, 3, 4, 5):
            assert relative_error(out[row, column], golden[row, column]) < 1e-4


def test_int8_minus_128_is_multiplied_too():
    values = torch.full((3, 256), -128, dtype=torch.int8)
    weight = quantization.QuantizedWeight(values, torch.ones(3, 1), 256)
    x = torch.full((2, 256), 127.0)
    assert torch.equal(qvl_kernels.quantized_linear(x, weight), torch.full((2, 3), -128.0 * 127 * 256))


@pytest.mark.parametrize(("bits", "group", "options"), FORMATS)
def test_a_vision_block_in_one_call_equals_its_single_ops(bits, group, options):
    arguments = next(case for case in VISION_CASES if case.name == "odd").make(torch.float32, _generator())
    weights = arguments["weights"]
    arguments["weights"] = weights._replace(
        **{
            name: quantization.quantize(getattr(weights, name), bits, group, **options)
            for name in ("qkv_w", "fc1_w", "fc2_w")
        }
    )
    with torch.no_grad():
        out = qvl_kernels.vision_block(**arguments)
        w = arguments["weights"]
        composed = unfused_vision_block(
            arguments["x"],
            [w.norm1_w, w.norm1_b, w.norm2_w, w.norm2_b],
            [w.qkv_w, w.proj_w, w.fc1_w, w.fc2_w],
            [w.qkv_b, w.proj_b, w.fc1_b, w.fc2_b],
            arguments["cos"],
            arguments["sin"],
            arguments["cu_seqlens"],
            arguments["num_heads"],
            1e-6,
        )
        with qvl_kernels.use_backend("reference"):
            reference = qvl_kernels.vision_block(**arguments)
    assert relative_error(out, composed) < 1e-3  # a rounding tie of int8 may flip
    assert relative_error(out, reference) < 0.02
