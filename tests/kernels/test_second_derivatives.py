"""Second derivatives: right on every backend, and refused where a kernel has none."""

import pytest
import torch
from op_cases import CONSTANTS, OPS, TWICE, differentiable, double, generator, outputs, penalty_gradients
from public_calls import CALLS, INFERENCE_ONLY, sizes
from torch.utils.checkpoint import checkpoint

import qvl_kernels
from qvl_kernels.testing import relative_error


@pytest.mark.parametrize(("op", "name"), TWICE)
def test_second_derivatives_are_the_reference_s(op, name):
    function, cases = OPS[op]
    (case,) = (case for case in cases if case.name == name)
    arguments = case.make(torch.float32, generator())
    with torch.no_grad():
        cotangents = [torch.randn(out.shape, generator=generator()) for out in outputs(function(**arguments))]
    with qvl_kernels.use_backend("reference"):
        golden = penalty_gradients(function, differentiable(double(arguments)), cotangents)
    with qvl_kernels.use_backend("cpp"):
        found = penalty_gradients(function, differentiable(arguments), cotangents)
    for ours, exact in zip(found, golden, strict=True):
        assert relative_error(ours, exact) < 1e-4


@pytest.mark.parametrize("name", [name for name in CALLS if name in {op for op, _ in TWICE} | {"attention varlen"}])
def test_references_have_second_derivatives(name):
    function, make = CALLS[name]
    arguments = double(make(sizes(B=1, T=2, S=3, H=2, HKV=1, D=2, C=3, F=2, N=3, V=3, K=32, P=1)))
    names = [
        name
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in CONSTANTS
    ]

    def call(*values):
        return outputs(function(**{**arguments, **dict(zip(names, values))}))

    inputs = [arguments[name].requires_grad_() for name in names]
    with qvl_kernels.use_backend("reference"):
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True) and torch.autograd.gradgradcheck(
            call, inputs, fast_mode=True
        )


def test_penalty_of_a_loss():
    """The head's derivative contributes, and its weight has a gradient."""
    generator_, labels = generator(), torch.arange(7) % 5
    hidden, weight = (torch.randn(*shape, generator=generator_) for shape in ((7, 16), (50, 16)))

    def penalty(loss, *inputs):
        return torch.autograd.grad(
            sum(x.square().sum() for x in torch.autograd.grad(loss(*inputs), inputs, create_graph=True)), inputs
        )

    ours = penalty(
        lambda h, w: 9 * qvl_kernels.linear_cross_entropy(h, w, labels),
        hidden.requires_grad_(),
        weight.requires_grad_(),
    )
    exact = penalty(
        lambda h, w: 9 * torch.nn.functional.cross_entropy(h @ w.T, labels),
        *(x.detach().double().requires_grad_() for x in (hidden, weight)),
    )
    torch.testing.assert_close([x.double() for x in ours], list(exact), rtol=1e-4, atol=1e-5)


def test_an_input_computed_from_another():
    """Each argument's gradient is counted once, also if one argument is a function of the other."""
    x = torch.randn(6, 8, generator=generator()).requires_grad_()

    def penalty(swiglu, x):
        (first,) = torch.autograd.grad(swiglu(x, x.sin()).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    exact = penalty(lambda gate, up: torch.nn.functional.silu(gate) * up, x.detach().double().requires_grad_())
    torch.testing.assert_close(penalty(qvl_kernels.swiglu, x).double(), exact, rtol=1e-5, atol=1e-5)


def test_hidden_keys_may_hold_anything():
    q, k, v = (torch.randn(1, 4, 2, 8, generator=generator()).requires_grad_() for _ in range(3))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 3] = False
    gaps = [x.detach().index_fill(1, torch.tensor([3]), float("nan")).requires_grad_() for x in (k, v)]
    found, clean = (
        penalty_gradients(qvl_kernels.attention, {"q": q, "k": a, "v": b, "mask": mask}, [torch.ones_like(q)])
        for a, b in (gaps, (k, v))
    )
    torch.testing.assert_close(found, clean)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_compiling_go_on(reentrant):
    x, weight = (torch.randn(shape, generator=generator()).requires_grad_() for shape in ((5, 16), (16,)))

    def block(x):
        y = qvl_kernels.rms_norm(x, weight)
        return qvl_kernels.linear_cross_entropy(qvl_kernels.swiglu(y, x), x, torch.arange(5))

    expected = torch.autograd.grad(block(x), (x, weight))
    for call in (
        lambda x: checkpoint(block, x, use_reentrant=reentrant),
        torch.compile(block, backend="aot_eager", fullgraph=True),
    ):
        x.grad = weight.grad = None
        call(x).backward()
        torch.testing.assert_close((x.grad, weight.grad), expected)


def test_every_trained_op_is_here():
    assert {op for op, _ in TWICE} == set(OPS) - {name.split()[0] for name in INFERENCE_ONLY}
