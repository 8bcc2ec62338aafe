"""Every op over its shared cases: accuracy against the fp64 reference, gradients, opcheck and torch.compile."""

import pytest
import torch
from bounds import norm_error
from op_cases import INFERENCE_ONLY, OPS, differentiable, double, generator, gradients, map_tensors, outputs, reference
from quantized_numbers import rounded_again

import qvl_kernels
from qvl_kernels.testing import assert_close_to_fp64, poisoned_empty

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = [pytest.param(op, case, id=f"{op}-{case.name}") for op, (_, cases) in OPS.items() for case in cases]
SMALL = [param for param in ALL if not param.values[1].model]
LARGE_BYTES = 2e8  # larger inputs are tested in bf16 only, to save time
MODEL_SIZES = [
    pytest.param(*param.values, dtype, id=f"{param.id}-{dtype}")
    for param in ALL
    for dtype in DTYPES
    if param.values[1].model and (dtype == torch.bfloat16 or param.values[1].bytes(2) < LARGE_BYTES)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_forward(op, case, dtype, monkeypatch):
    _check_forward(op, case, dtype, monkeypatch)


@pytest.mark.parametrize(("op", "case", "dtype"), MODEL_SIZES)
def test_model_sizes(op, case, dtype, monkeypatch):
    _check_forward(op, case, dtype, monkeypatch)


def _check_forward(op, case, dtype, monkeypatch):
    function = OPS[op][0]
    arguments = case.make(dtype, generator())
    golden_arguments, baseline_arguments = double(arguments), map_tensors(torch.clone, arguments)
    golden, baseline = reference(function, golden_arguments), reference(function, baseline_arguments)
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    with qvl_kernels.use_backend("cpp"):
        out = outputs(function(**arguments))
    monkeypatch.undo()
    assert len(out) == len(golden)
    # Layers round more often than once.
    floor = norm_error(dtype, _longest_sum(arguments), roundings=4) + rounded_again(arguments)
    for ours, plain, exact in zip(out, baseline, golden):
        assert_close_to_fp64(ours, plain, exact, floor=floor)
    if op == "decoder_layer":  # the written KV cache, with everything around it unchanged
        for name in ("k_cache", "v_cache"):
            assert_close_to_fp64(arguments[name], baseline_arguments[name], golden_arguments[name], floor=floor)


def _longest_sum(arguments: dict) -> int:
    """Number of terms of the longest sum: over the last dimension of a tensor, or over all others (tokens, keys,
    outputs).
    """
    lengths = [1]
    map_tensors(lambda x: lengths.extend((x.shape[-1], x.shape[:-1].numel())), arguments)
    return max(lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), [p for p in SMALL if p.values[0] not in INFERENCE_ONLY])
def test_gradients(op, case, dtype):
    function = OPS[op][0]
    arguments = differentiable(case.make(dtype, generator()))
    with torch.no_grad(), qvl_kernels.use_backend("reference"):
        cotangents = [torch.randn(out.shape, generator=generator()) for out in outputs(function(**arguments))]
    with qvl_kernels.use_backend("reference"):
        golden = gradients(function, differentiable(double(arguments)), cotangents)
        baseline = gradients(function, arguments, cotangents)
    with qvl_kernels.use_backend("cpp"):
        ours = gradients(function, arguments, cotangents)
    floor = norm_error(
        dtype, _longest_sum(arguments), roundings=6
    )  # probabilities and their gradients are rounded, too
    for gradient, plain, exact in zip(ours, baseline, golden):
        assert_close_to_fp64(gradient, plain, exact, factor=3.0, floor=floor)


@pytest.mark.parametrize(("op", "case"), [p for p in SMALL if p.values[1].name != "empty"])
def test_compile_fullgraph(op, case):
    function = OPS[op][0]
    arguments = case.make(torch.float32, generator())
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = outputs(torch.compile(function, fullgraph=True, backend="aot_eager")(**arguments))
        plain = outputs(function(**arguments))
    for one, other in zip(compiled, plain):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
