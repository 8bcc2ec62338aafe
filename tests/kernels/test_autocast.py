"""Kernel functions ignore autocast: they compute in the dtypes of their arguments, and callers cast."""

import pytest
import torch

import qvl_kernels
from qvl_kernels import tuning
from qvl_kernels.ops.decoder_layer.cases import CASES as DECODER
from qvl_kernels.ops.linear.cases import CASES as LINEAR
from qvl_kernels.ops.vision_block.cases import CASES as VISION

CASES = [
    pytest.param(function, case, id=f"{function.__name__}-{case.name}")
    for function, cases in (
        (qvl_kernels.linear, LINEAR),
        (qvl_kernels.decoder_layer, DECODER),
        (qvl_kernels.vision_block, VISION),
    )
    for case in cases
    if not case.model
]


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [tuning.QVL, tuning.PYTORCH])
@pytest.mark.parametrize(("function", "case"), CASES)
def test_results_do_not_depend_on_autocast(function, case, backend, dtype, lower, monkeypatch):
    monkeypatch.setattr(tuning, "chosen", lambda kind: backend)
    results = []
    for enabled in (False, True):
        arguments = case.make(dtype, torch.Generator().manual_seed(0))
        with torch.no_grad(), qvl_kernels.use_backend("cpp"), torch.autocast("cpu", lower, enabled=enabled):
            results.append(function(**arguments))
    assert results[0].dtype is results[1].dtype and torch.equal(*results)
