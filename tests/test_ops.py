"""Every op over its shared cases: accuracy against the float64 reference, gradients, opcheck and torch.compile."""

import importlib

import pytest
import torch

import qvl_kernels
from qvl_kernels.testing import assert_close_to_truth, poisoned_empty

# op -> (folder in qvl_kernels/ops, name of its case list)
CASE_LISTS = {
    "attention": ("attention", "CASES"),
    "cross_attention": ("cross_attention", "CASES"),
    "decode_attention": ("decode_attention", "CASES"),
    "rms_norm": ("rms_norm", "CASES"),
    "add_rms_norm": ("rms_norm", "ADD_CASES"),
    "layer_norm": ("layer_norm", "CASES"),
    "add_layer_norm": ("layer_norm", "ADD_CASES"),
    "qk_norm_rope": ("rope", "CASES"),
    "vision_rope": ("rope", "VISION_CASES"),
    "swiglu": ("swiglu", "CASES"),
    "gelu_tanh": ("gelu_tanh", "CASES"),
    "patch_embed": ("patch_embed", "CASES"),
    "linear": ("linear", "CASES"),
    "linear_cross_entropy": ("linear_cross_entropy", "CASES"),
    "decoder_layer": ("decoder_layer", "CASES"),
    "vision_block": ("vision_block", "CASES"),
}
OPS = {
    op: (getattr(qvl_kernels, op), getattr(importlib.import_module(f"qvl_kernels.ops.{folder}.cases"), cases))
    for op, (folder, cases) in CASE_LISTS.items()
}
INFERENCE_ONLY = {"decode_attention", "decoder_layer", "vision_block"}
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


def _outputs(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _map(function, value):
    """function over every floating-point tensor of a value, those inside NamedTuples too."""
    if isinstance(value, dict):
        return {name: _map(function, item) for name, item in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(_map(function, item) for item in value))
    return function(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _double(arguments: dict) -> dict:
    return _map(torch.Tensor.double, arguments)


def _reference(function, arguments: dict):
    with qvl_kernels.use_backend("reference"):
        return _outputs(function(**arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_forward(op, case, dtype, monkeypatch):
    _check_forward(op, case, dtype, monkeypatch)


@pytest.mark.parametrize(("op", "case", "dtype"), MODEL_SIZES)
def test_model_sizes(op, case, dtype, monkeypatch):
    _check_forward(op, case, dtype, monkeypatch)


def _check_forward(op, case, dtype, monkeypatch):
    function = OPS[op][0]
    arguments = case.make(dtype, _generator())
    truth_arguments, baseline_arguments = _double(arguments), _map(torch.clone, arguments)
    truth, baseline = _reference(function, truth_arguments), _reference(function, baseline_arguments)
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    with qvl_kernels.use_backend("cpp"):
        out = _outputs(function(**arguments))
    monkeypatch.undo()
    assert len(out) == len(truth)
    for ours, plain, exact in zip(out, baseline, truth):
        assert_close_to_truth(ours, plain, exact)
    if op == "decoder_layer":  # the written cache, and everything around it untouched
        for name in ("k_cache", "v_cache"):
            assert_close_to_truth(arguments[name], baseline_arguments[name], truth_arguments[name])


CONSTANTS = {"cos", "sin"}  # rotary tables have no gradient: transformers computes them under no_grad


def _differentiable(arguments: dict) -> dict:
    return {
        name: value if name in CONSTANTS else _map(lambda x: x.detach().clone().requires_grad_(), value)
        for name, value in arguments.items()
    }


def _gradients(function, arguments: dict, cotangents) -> list[torch.Tensor]:
    inputs = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    outputs = [out for out in _outputs(function(**arguments)) if out.requires_grad]
    loss = sum((out * cotangent.to(out.dtype)).sum() for out, cotangent in zip(outputs, cotangents))
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), [p for p in SMALL if p.values[0] not in INFERENCE_ONLY])
def test_gradients(op, case, dtype):
    function = OPS[op][0]
    arguments = _differentiable(case.make(dtype, _generator()))
    with torch.no_grad(), qvl_kernels.use_backend("reference"):
        cotangents = [torch.randn(out.shape, generator=_generator()) for out in _outputs(function(**arguments))]
    with qvl_kernels.use_backend("reference"):
        truth = _gradients(function, _differentiable(_double(arguments)), cotangents)
        baseline = _gradients(function, arguments, cotangents)
    with qvl_kernels.use_backend("cpp"):
        ours = _gradients(function, arguments, cotangents)
    for gradient, plain, exact in zip(ours, baseline, truth):
        assert_close_to_truth(gradient, plain, exact, factor=3.0)


@pytest.mark.parametrize(("op", "case"), [p for p in SMALL if p.values[1].name != "empty"])
def test_compile_fullgraph(op, case):
    function = OPS[op][0]
    arguments = case.make(torch.float32, _generator())
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = _outputs(torch.compile(function, fullgraph=True, backend="aot_eager")(**arguments))
        plain = _outputs(function(**arguments))
    for one, other in zip(compiled, plain):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
