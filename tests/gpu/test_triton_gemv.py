"""GEMV ops: fused norm, and the epilogue (bias, SwiGLU, residual), over every weight format, against the fp64
reference.
"""

import pytest
import torch
from op_cases import double, generator

import qvl_kernels
from qvl_kernels import config
from qvl_kernels.ops.gemv import cases, reference, tiles
from qvl_kernels.testing import GuardedEmpty, assert_close_to_fp64, surrounded

REFERENCES = {
    "gemv": reference.gemv_reference,
    "gemv_swiglu": reference.gemv_swiglu_reference,
    "quantized_gemv": reference.quantized_gemv_reference,
    "quantized_gemv_swiglu": reference.quantized_gemv_swiglu_reference,
}
# The interpreter takes minutes for the head's 151,936 rows and for large M over an MLP, which test nothing more than
# smaller cases.
LARGEST = 4e7 if config.interpreted() else float("inf")  # FLOPs
CASES = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.model and config.interpreted() else [])
    for case in cases.CASES
    if case.flops <= LARGEST
]


def _run(arguments: dict, device, monkeypatch) -> torch.Tensor:
    ours = {
        name: surrounded(value.to(device)) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    guard = GuardedEmpty()
    monkeypatch.setattr(torch, "empty", guard)
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        out = cases.op_of(arguments)(*ours.values())
    monkeypatch.undo()
    guard.check()
    return out.cpu()


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype, device, monkeypatch):
    arguments = case.make(dtype, generator())
    formula = REFERENCES[cases.op_of(arguments)._schema.name.removeprefix("qvl::")]
    out = _run(arguments, device, monkeypatch)
    # SwiGLU rounds twice as often: exp, sum, quotient and product follow the two sums. It has few outputs, so the ratio
    # to PyTorch's error is noisy.
    floor = (4 if any(name.startswith("up") for name in arguments) else 2) * torch.finfo(dtype).eps
    # The unfused path overflows where x times the norm's weight does; the kernel must not.
    assert_close_to_fp64(out, formula(*arguments.values()), formula(*double(arguments).values()), floor=floor)


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_more_rows_than_a_tile(bits, device, monkeypatch):
    """Launchers take any M: tokens beyond a tile are further programs."""
    arguments = cases._case("rows_18", 18, 5, 64, bits=bits, group=32).make(torch.float16, generator())
    formula = REFERENCES[cases.op_of(arguments)._schema.name.removeprefix("qvl::")]
    assert_close_to_fp64(
        _run(arguments, device, monkeypatch), formula(*arguments.values()), formula(*double(arguments).values())
    )


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_rows_do_not_depend_on_each_other(bits, device, monkeypatch):
    """A NaN affects its own token only, also within a tile."""
    for rows in (3, 6):
        arguments = cases._case("nan", rows, 4, 64, bits=bits, group=32).make(torch.float32, generator())
        arguments["x"][1, 5] = float("nan")
        out = _run(arguments, device, monkeypatch)
        assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


def test_tiles_fill_an_h100():
    """At least 128 programs for every linear layer of the model, and 16 bytes per load and thread in whole rows of the
    weight.
    """
    for n, k in ((2048, 2048), (1024, 2048), (6144, 2048), (2048, 6144), (151936, 2048), (1024, 4096)):
        for bits in (0, 8, 4):
            tile = tiles.gemv_fma(1, n, k, 2, bits, False, "sm_90")
            assert n / tile["BLOCK_N"] >= 128 and tile["BLOCKS"] >= 32 * tile["num_warps"], (n, k, bits, tile)
            waste = (
                -(-k // (tile["BLOCKS"] * {0: 8, 8: 16, 4: 32}[bits])) * tile["BLOCKS"] * {0: 8, 8: 16, 4: 32}[bits] / k
            )
            assert waste == 1.0, (n, k, bits, tile)
