"""Second derivatives through the Triton kernels, against the fp64 reference."""

import pytest
import torch
from op_cases import OPS, TWICE, differentiable, double, generator, outputs, penalty_gradients

import qvl_kernels
from qvl_kernels import library
from qvl_kernels.testing import relative_error

KERNELS = [
    (op, name)
    for op, name in TWICE
    if {"cross_attention": "attention", "patch_embed": "linear"}.get(op, op) in library.LAUNCHERS
]


@pytest.mark.parametrize(("op", "name"), [case for case in KERNELS if case[0] != "quantized_linear"])
def test_second_derivatives(op, name, device):
    function, cases = OPS[op]
    (case,) = (case for case in cases if case.name == name)
    arguments = case.make(torch.float32, generator())
    with torch.no_grad(), qvl_kernels.use_backend("reference"):
        cotangents = [
            torch.randn(out.shape, generator=generator()).to(device) for out in outputs(function(**arguments))
        ]
    there = {
        key: value.to(device)
        for key, value in arguments.items()
        if isinstance(value, torch.Tensor) and key != "cu_seqlens"
    }
    arguments = {**arguments, **there}
    with qvl_kernels.use_backend("reference"):
        golden = penalty_gradients(function, differentiable(double(arguments)), cotangents)
    with qvl_kernels.use_backend("triton"):
        found = penalty_gradients(function, differentiable(arguments), cotangents)
    for ours, exact in zip(found, golden, strict=True):
        assert relative_error(ours, exact) < 1e-3


def test_dropout_has_first_derivatives_only(device):
    q = torch.randn(1, 4, 2, 16, generator=generator()).to(device).requires_grad_()
    with qvl_kernels.use_backend("triton"):
        (first,) = torch.autograd.grad(qvl_kernels.attention(q, q, q, dropout_p=0.5).sum(), q, create_graph=True)
    assert first.isfinite().all()
    with pytest.raises(RuntimeError, match="once differentiable"):
        first.sum().backward()
