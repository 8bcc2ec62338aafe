"""Every Triton kernel over the shared cases, forward and backward, against the fp64 reference, beside PyTorch on the
same device.
"""

import pytest
import torch
from op_cases import INFERENCE_ONLY, OPS, differentiable, double, generator, gradients, outputs, reference

import qvl_kernels
from qvl_kernels import config, library
from qvl_kernels.testing import GuardedEmpty, assert_close_to_fp64, surrounded

SAME_KERNELS = {"cross_attention": "attention", "patch_embed": "linear"}  # public functions that call another one's op
SLOW = {"one_query", "split_keys"}  # slow in the interpreter, as the model's shapes are
GPU_ONLY = (
    {"decode_head"} if config.interpreted() else set()
)  # 151,936 rows: 5 minutes in the interpreter, and decode_mlp covers the same
ALL = [
    pytest.param(
        op,
        case,
        id=f"{op}-{case.name}",
        marks=[pytest.mark.slow] if (case.model or case.name in SLOW) and config.interpreted() else [],
    )
    for op, (_, cases) in OPS.items()
    if SAME_KERNELS.get(op, op) in library.LAUNCHERS
    for case in cases
    if case.name not in GPU_ONLY
]


def _on(device: torch.device, value):
    """Arguments on ``device``, each tensor surrounded by NaN or -1."""
    if isinstance(value, dict):
        return {name: _on(device, item) for name, item in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(_on(device, item) for item in value))
    return surrounded(value.to(device)) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(("op", "case"), ALL)
def test_forward(op, case, dtype, device, monkeypatch):
    function = OPS[op][0]
    arguments = case.make(dtype, generator())
    golden_arguments, baseline_arguments = (_on(device, value) for value in (double(arguments), arguments))
    golden, baseline = reference(function, golden_arguments), reference(function, baseline_arguments)
    ours_arguments = _on(device, arguments)
    guard = GuardedEmpty()
    monkeypatch.setattr(torch, "empty", guard)
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        out = outputs(function(**ours_arguments))
    monkeypatch.undo()
    guard.check()
    assert len(out) == len(golden)
    for ours, plain, exact in zip(out, baseline, golden):
        assert_close_to_fp64(ours, plain, exact)
    if op == "decoder_layer":
        for name in ("k_cache", "v_cache"):
            assert_close_to_fp64(ours_arguments[name], baseline_arguments[name], golden_arguments[name])


@pytest.mark.parametrize(("op", "case"), [p for p in ALL if p.values[0] not in INFERENCE_ONLY])
def test_gradients(op, case, dtype, device, monkeypatch):
    if config.interpreted() and (op, case.name, dtype) == ("linear_cross_entropy", "tokens_256", torch.float16):
        pytest.skip(
            "an hour of NumPy's fp16 products over 151,936 words; fp32 takes a minute and a half, and smaller cases "
            "are tested in fp16"
        )
    function = OPS[op][0]
    arguments = differentiable(case.make(dtype, generator()))
    with torch.no_grad(), qvl_kernels.use_backend("reference"):
        cotangents = [torch.randn(out.shape, generator=generator()) for out in outputs(function(**arguments))]
    there = [cotangent.to(device) for cotangent in cotangents]
    with qvl_kernels.use_backend("reference"):
        golden = gradients(function, differentiable(_on(device, double(arguments))), there)
        baseline = gradients(function, differentiable(_on(device, arguments)), there)
    ours_arguments = differentiable(_on(device, arguments))
    guard = GuardedEmpty()
    monkeypatch.setattr(torch, "empty", guard)
    with qvl_kernels.use_backend("triton"):
        ours = gradients(function, ours_arguments, there)
    monkeypatch.undo()
    guard.check()
    # Scores of up to 300 are rounded by up to 150 units of fp32, and exponents with them; the backward recomputes them,
    # where PyTorch keeps probabilities. The difference depends on the order of sums, which varies between processors.
    floor = (
        max(2 * torch.finfo(dtype).eps, 64 * torch.finfo(torch.float32).eps) if case.name == "large_scores" else None
    )
    for gradient, plain, exact in zip(ours, baseline, golden):
        assert_close_to_fp64(gradient, plain, exact, factor=3.0, floor=floor)
