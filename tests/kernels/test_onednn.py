"""Matmuls by oneDNN, as on machines with AMX, forced here: layers composed of single ops around PyTorch's
own linear.
"""

import pytest
import torch
from bounds import norm_error
from kernel_selection import MATMULS, select, selections
from op_cases import OPS, double, generator, outputs, reference

import qvl_kernels
from qvl_kernels.ops.linear import onednn
from qvl_kernels.testing import assert_close_to_truth, relative_error, surrounded

CASES = [
    pytest.param(op, case, id=f"{op}-{case.name}") for op in sorted(MATMULS) for case in OPS[op][1] if not case.model
]
NAN = float("nan")


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the weights that PyTorch's linear was called with."""
    seen, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda x, weight, bias=None: (seen.append(weight.shape), linear(x, weight, bias))[1],
    )
    return seen


@pytest.mark.parametrize(("op", "case"), CASES)
def test_each_kernel_selection(op, case, calls):
    function, plain_arguments = OPS[op][0], case.make(torch.bfloat16, generator())
    golden, plain = reference(function, double(plain_arguments)), reference(function, plain_arguments)
    for name in selections(op, torch.bfloat16):
        calls.clear()
        arguments = case.make(torch.bfloat16, generator())
        with torch.no_grad(), qvl_kernels.use_backend("cpp"), select(name):
            out = outputs(function(**arguments))
        assert bool(calls) == (name == "onednn" and case.name in ("whole_tiles", "bool_mask")), name
        for ours, baseline, exact in zip(out, plain, golden):
            assert_close_to_truth(ours, baseline, exact, floor=norm_error(torch.bfloat16, 1, roundings=4))


def test_onednn_takes_many_rows_of_bf16_in_whole_tiles(calls):
    with select("onednn"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows in (onednn.MIN_ROWS - 1, onednn.MIN_ROWS):
                for k in (31, 32, 33, 48, 64):
                    qvl_kernels.linear(torch.randn(rows, k).to(dtype), torch.randn(5, k).to(dtype))
                    assert bool(calls) == (dtype is torch.bfloat16 and rows >= onednn.MIN_ROWS and k % 32 == 0), (
                        dtype,
                        rows,
                        k,
                    )
                    calls.clear()


@pytest.mark.parametrize("name", ["onednn", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_lies_between_rows_is_not_read(dtype, name):
    """Memory around the tensors and between their rows is NaN, and so is one row."""
    others = torch.arange(40) != 20
    for k in (*range(1, 10), 31, 32, 33, 48, 63, 64, 65, 96):
        for gaps in ((0, 0), (3, 0), (0, 3), (1, 1), (8, 8)):
            x, weight = (
                surrounded(torch.randn(rows, k + gap, generator=generator()).to(dtype)[:, :k])
                for rows, gap in zip((40, 11), gaps)
            )
            x[20] = NAN
            with select(name):
                out = qvl_kernels.linear(x, weight)
            assert out[20].isnan().all() and out[others].isfinite().all(), (k, gaps)
            assert relative_error(out[others], x[others].double() @ weight.double().T) < 1e-2


def test_measurement_decides(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    onednn.onednn_is_faster.cache_clear()
    try:
        assert onednn.onednn_is_faster() in (True, False)
        x, weight = torch.randn(64, 96).bfloat16(), torch.randn(32, 96).bfloat16()
        assert relative_error(qvl_kernels.linear(x, weight), x.float() @ weight.float().T) < 1e-2
    finally:
        onednn.onednn_is_faster.cache_clear()
