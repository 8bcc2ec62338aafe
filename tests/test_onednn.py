"""The route of machines with AMX, forced here: layers composed of single ops around PyTorch's own linear."""

import pytest
import torch

import qvl_kernels
from qvl_kernels.ops.decoder_layer.cases import CASES as DECODER
from qvl_kernels.ops.linear import onednn
from qvl_kernels.ops.linear.cases import CASES as LINEAR
from qvl_kernels.ops.vision_block.cases import CASES as VISION
from qvl_kernels.testing import assert_close_to_truth, relative_error

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


@pytest.mark.parametrize(("function", "case"), CASES)
def test_onednn_route(function, case, monkeypatch):
    used = []
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: not used.append(True))
    arguments = case.make(torch.bfloat16, torch.Generator().manual_seed(0))
    with qvl_kernels.use_backend("cpp"):
        got = function(**arguments)
    monkeypatch.undo()
    with qvl_kernels.use_backend("reference"):
        plain = function(**arguments)
        wide = {
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in arguments.items()
        }
        if "weights" in arguments:
            wide["weights"] = type(arguments["weights"])(*(w if w is None else w.double() for w in arguments["weights"]))
        truth = function(**wide)
    assert_close_to_truth(got, plain, truth)
    rows = got.numel() // got.shape[-1] if got.numel() else 0
    assert bool(used) == (rows >= onednn.MIN_ROWS)


def test_measurement_decides(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    onednn.onednn_is_faster.cache_clear()
    try:
        assert onednn.onednn_is_faster() in (True, False)
        x, weight = torch.randn(64, 96).bfloat16(), torch.randn(32, 96).bfloat16()
        assert relative_error(qvl_kernels.linear(x, weight), x.float() @ weight.float().T) < 1e-2
    finally:
        onednn.onednn_is_faster.cache_clear()
