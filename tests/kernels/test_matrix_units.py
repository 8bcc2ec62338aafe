"""Matrix units: the emulation against the hardware, oneDNN beside us, and how int4 is rounded on them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_selection import ISAS, TILE_ISAS, select
from quantized_numbers import requantized
from weight_formats import INT4_FORMATS

import qvl_kernels
from qvl_kernels import quantization
from qvl_kernels.testing import relative_error

AMX = pytest.mark.skipif("amx" not in ISAS, reason="needs AMX")
EMULATED = pytest.mark.skipif("amx_emulated" not in ISAS, reason="built without QVL_TEST_TARGETS")


def _uniform(generator: torch.Generator, shape: tuple[int, ...], least: int, most: int) -> torch.Tensor:
    """Numbers of either sign with exponents in [least, most), zeros among them."""
    exponents = torch.randint(least, most, shape, generator=generator)
    numbers = torch.ldexp(torch.rand(shape, generator=generator) * 2 - 1, exponents).bfloat16()
    return numbers.masked_fill_(torch.rand(shape, generator=generator) < 0.1, -0.0)


def _with_not_finite(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    numbers = _uniform(generator, shape, 0, 1)
    for value in (torch.inf, -torch.inf, torch.nan):
        numbers.masked_fill_(torch.rand(shape, generator=generator) < 0.003, value)
    return numbers


NUMBERS = {
    "ordinary": lambda generator, shape: _uniform(generator, shape, 0, 1),
    "wide": lambda generator, shape: _uniform(generator, shape, -20, 20),
    "products_that_are_subnormal": lambda generator, shape: _uniform(generator, shape, -75, -60),
    "subnormal": lambda generator, shape: _uniform(generator, shape, -140, 10),
    "sums_that_overflow": lambda generator, shape: _uniform(generator, shape, 50, 66),
    "not_finite": _with_not_finite,
    "any_bits": lambda generator, shape: torch.randint(
        -(2**15), 2**15, shape, generator=generator, dtype=torch.int16
    ).view(torch.bfloat16),
}


def _assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    bits = torch.int16 if a.element_size() == 2 else torch.int32
    same = (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())
    first = tuple((~same).nonzero()[0].tolist()) if not same.all() else ()
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ, at {first}: {a[first]} and {b[first]}"


def _sums(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [T, D] times k [D] as tiles add it up: with one key the log-sum-exp is the score, in fp32, and with a mask and
    a scale of 1 nothing is rounded behind the tiles.
    """
    q, k = q[None, :, None], k[None, None, None]
    mask = torch.ones(1, 1, q.shape[1], 1, dtype=torch.bool)
    return qvl_kernels.attention(q, k, torch.zeros_like(k), mask=mask, scale=1.0, return_lse=True)[1].flatten()


@EMULATED
@AMX
@pytest.mark.parametrize("numbers", NUMBERS)
def test_bf16_is_emulated_bit_for_bit(numbers):
    generator = torch.Generator().manual_seed(0)
    for size in (32, 64, 320):
        x, weight = (NUMBERS[numbers](generator, shape) for shape in ((40, size), (16, size)))
        outs, sums = [], []
        for isa in TILE_ISAS:
            with select(isa), qvl_kernels.use_backend("cpp"):
                outs.append(qvl_kernels.linear(x, weight))
                sums.append(torch.stack([_sums(x, row) for row in weight]))
        _assert_same_bits(*outs)
        _assert_same_bits(*sums)
        if numbers == "ordinary":  # these are the sums
            assert relative_error(sums[0], weight.double() @ x.double().T) < 1e-6


@EMULATED
@AMX
@pytest.mark.parametrize("bits", [8, 4])
def test_int8_is_emulated_bit_for_bit(bits):
    """One group: its integer sums are exact, and scaled once."""
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((17, 5, 128), (80, 130, 100), (64, 32, 3)):
        x = torch.randn(m, k, generator=generator)
        x[3] = torch.nan
        weight = quantization.quantize(torch.randn(n, k, generator=generator), bits, 32)
        outs = []
        for isa in TILE_ISAS:
            with select(isa):
                outs.append(qvl_kernels.quantized_linear(x, weight))
        _assert_same_bits(*outs)


@AMX
def test_neither_we_nor_onednn_disturb_the_others_tiles():
    """In turns, and from several threads at once."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((96, 256), (128, 256)))
    q, k, v = (torch.randn(1, 70, 4, 64, generator=generator).bfloat16() for _ in range(3))
    weights = [quantization.quantize(weight, bits) for bits in (8, 4)]
    calls = [
        lambda: qvl_kernels.linear(x, weight),
        lambda: torch.nn.functional.linear(x, weight),
        lambda: qvl_kernels.attention(q, k, v, causal=True),
        lambda: torch.nn.functional.linear(x[:40, :100], weight[:, :100]),
        *(lambda quantised=quantised: qvl_kernels.quantized_linear(x, quantised) for quantised in weights),
    ]

    def in_turns(first: int) -> list[tuple[int, torch.Tensor]]:
        return [(i % len(calls), calls[i % len(calls)]()) for i in range(first, first + 10 * len(calls))]

    with select("amx"), torch.no_grad():
        alone = [call() for call in calls]
        with ThreadPoolExecutor(3) as pool:
            results = [in_turns(0), *pool.map(in_turns, range(3))]
    assert all(torch.equal(out, alone[index]) for result in results for index, out in result)


@pytest.mark.parametrize(("bits", "group", "options"), INT4_FORMATS)
def test_int4_loses_little_to_int8_on_tiles(bits, group, options):
    """Rounding int4 again, to int8, adds less than 1 % to the error of int4 itself."""
    dense = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0))
    weight = quantization.quantize(dense, bits, group, **options)
    error = relative_error(quantization.dequantize(weight), dense)
    assert relative_error(requantized(weight), quantization.dequantize(weight)) < 0.01
    assert relative_error(requantized(weight), dense) < 1.01 * error


@pytest.mark.parametrize("isa", [isa for isa in TILE_ISAS if isa in ISAS])
@pytest.mark.parametrize(("bits", "group", "options"), INT4_FORMATS)
def test_int4_and_activations_on_tiles(isa, bits, group, options):
    """With all roundings the product is within 1.3 % of the exact one with this weight."""
    generator = torch.Generator().manual_seed(0)
    weight = quantization.quantize(torch.randn(100, 1024, generator=generator), bits, group, **options)
    x = torch.randn(70, 1024, generator=generator)
    with select(isa):
        out = qvl_kernels.quantized_linear(x, weight)
    assert 0.005 < relative_error(out, x.double() @ quantization.dequantize(weight).double().T) < 0.013
