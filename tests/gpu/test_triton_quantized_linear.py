"""quantized_linear on GPUs beyond the shared cases: rounding of activations to int8, both prefill kernels, and values
that are not finite.
"""

import pytest
import torch
from weight_formats import FORMATS

import qvl_kernels
from qvl_kernels.ops.quantized_linear import tiles, triton_int8
from qvl_kernels.quantization import dequantize, quantize
from qvl_kernels.testing import GuardedEmpty, assert_close_to_fp64, random_tensor, relative_error, surrounded


def _rand(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return random_tensor(shape, dtype, torch.Generator().manual_seed(seed))


def _run(x: torch.Tensor, weight, device, monkeypatch) -> torch.Tensor:
    ours = weight.apply(lambda x: surrounded(x.to(device)))
    x = surrounded(x.to(device))
    guard = GuardedEmpty()
    monkeypatch.setattr(torch, "empty", guard)
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        out = qvl_kernels.quantized_linear(x, ours)
    monkeypatch.undo()
    guard.check()
    return out.cpu()


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Activation rows rounded to int8 and dequantised."""
    scale = x.double().abs().amax(1, keepdim=True) / 127.0
    return torch.where(scale > 0, torch.round(x.double() / scale) * scale, 0.0)


@pytest.mark.parametrize("k", [1, 100, 300])
def test_rows_are_rounded_to_int8(k, dtype, device, monkeypatch):
    x = _rand(5, k, dtype=dtype)
    x[1], x[2] = 0.0, x[2] * 1e-4
    x[3, k // 2] = 1000.0  # an outlier: the others become small numbers
    monkeypatch.setattr(tiles, "quantize_rows", lambda k: {"BLOCK": 64, "num_warps": 1})  # rows of several blocks
    values, scales = (y.cpu() for y in triton_int8.launch_quantize_rows(surrounded(x.to(device))))
    exact = x.double() / (x.double().abs().amax(1, keepdim=True) / 127.0)
    exact[1] = 0.0
    assert (values.double() - exact).abs().max() <= 0.5 + 1e-4
    assert values.abs().amax(1).tolist() == [127, 0, 127, 127, 127]
    torch.testing.assert_close(scales.double(), x.double().abs().amax(1) / 127.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("m", "n", "k"), [(17, 70, 40), (40, 33, 129), (70, 66, 260)], ids=str)
def test_int8_products_are_exact_but_for_the_rounding_of_rows(m, n, k, dtype, device, monkeypatch):
    x, weight = _rand(m, k, dtype=dtype), quantize(_rand(n, k, seed=1), 8)
    out, wide = _run(x, weight, device, monkeypatch), dequantize(weight, torch.float64)
    # A number close to a rounding tie may be rounded either way.
    assert relative_error(out, _rounded(x) @ wide.t()) < 2 * torch.finfo(dtype).eps + 1e-4
    assert relative_error(out, x.double() @ wide.t()) < 0.012  # 8 bits of a normal distribution


@pytest.mark.parametrize(("bits", "group", "options"), FORMATS)
def test_widened_weight(bits, group, options, dtype, device, monkeypatch):
    monkeypatch.setattr(tiles, "quantized_linear_kernel", lambda *_: "dequantize")
    x, weight = _rand(20, 300, dtype=dtype), quantize(_rand(9, 300, seed=1), bits, group, **options)
    out = _run(x, weight, device, monkeypatch)
    assert_close_to_fp64(out, x @ dequantize(weight, dtype).t(), x.double() @ dequantize(weight, torch.float64).t())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite(bits, bad, device, monkeypatch):
    x, weight = _rand(20, 64, dtype=torch.float16), quantize(_rand(5, 64, seed=1), bits, 32)
    x[3, 7] = bad
    out = _run(x, weight, device, monkeypatch)
    good = torch.arange(20) != 3
    assert not out[3].isfinite().any() and out[good].isfinite().all()


def test_few_rows_keep_their_precision(device, monkeypatch):
    """Decode multiplies x unrounded; activations are rounded to int8 in prefill, from M = 17."""
    x, weight = _rand(17, 64), quantize(_rand(8, 64, seed=1), 8)
    exact = x.double() @ dequantize(weight, torch.float64).t()
    assert relative_error(_run(x[:16], weight, device, monkeypatch), exact[:16]) < 1e-6
    assert 1e-3 < relative_error(_run(x, weight, device, monkeypatch), exact) < 0.012
