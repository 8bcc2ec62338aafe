"""library.call bypasses PyTorch's dispatcher only where the dispatcher has nothing to do."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qvl_kernels import library, quantization
from qvl_kernels.ops.linear.op import linear_op
from qvl_kernels.ops.quantized_linear.op import quantized_linear_op
from qvl_kernels.ops.rms_norm.op import add_rms_norm_op, rms_norm_op


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


QUANTIZED = quantization.quantize(_rand(5, 40), 8)
CALLS = {
    rms_norm_op: (_rand(3, 40), _rand(40), 1e-6),
    add_rms_norm_op: (_rand(3, 40), _rand(3, 40), _rand(40), 1e-6),
    linear_op: (_rand(3, 40), _rand(5, 40), None),
    quantized_linear_op: (_rand(3, 40), QUANTIZED.values, QUANTIZED.scales, None, _rand(5)),
}


class _Wrapped(torch.Tensor):
    pass


class _SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _SeesOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def straight(monkeypatch):
    """The ops whose kernels were called past the dispatcher."""
    called = []

    def spy(op, kernel):
        return lambda *args: (called.append(op), kernel(*args))[1]

    monkeypatch.setattr(library, "_CPU", {op: spy(op, kernel) for op, kernel in library._CPU.items()})
    return called


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", CALLS, ids=str)
def test_inference_goes_straight(op, mode, straight):
    expected = op(*CALLS[op])
    with mode():
        out = library.call(op, *CALLS[op])
        made = tuple(x.clone() if torch.is_tensor(x) else x for x in CALLS[op])  # here, as inference tensors
        again = library.call(op, *made)
    assert straight == [op, op]
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def _negated(x):
    return torch._neg_view(-x)


SPECIAL = {
    "gradients": lambda op, args: library.call(op, *args),
    "dispatch mode": lambda op, args: _within(_SeesOps(), op, args),
    "function mode": lambda op, args: _within(_SeesFunctions(), op, args),
    "subclass": lambda op, args: _within(torch.no_grad(), op, (args[0].as_subclass(_Wrapped), *args[1:])),
    "negative view": lambda op, args: _within(torch.no_grad(), op, (_negated(args[0]), *args[1:])),
    "trace": lambda op, args: _within(
        torch.no_grad(),
        torch.jit.trace(lambda x: library.call(op, x, *args[1:]), _rand(3, 40) * 2, check_trace=False),
        (args[0],),
        direct=True,
    ),
    "compile": lambda op, args: _within(
        torch.no_grad(),
        torch.compile(lambda x: library.call(op, x, *args[1:]), backend="eager", fullgraph=True),
        (args[0],),
        direct=True,
    ),
}


def _within(context, op, args, direct=False):
    with torch.no_grad(), context:
        return op(*args) if direct else library.call(op, *args)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("op", [rms_norm_op, quantized_linear_op], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_everything_else_goes_through_the_dispatcher(op, special, straight):
    out = SPECIAL[special](op, CALLS[op])
    assert straight == []
    torch.testing.assert_close(torch.Tensor(out), op(*CALLS[op]))


def test_plain_tensors_are_plain_whoever_asks_first():
    with torch.inference_mode():
        keys = library._eager_dispatch_keys.__wrapped__("cpu")
    assert keys == library._eager_dispatch_keys("cpu") and len(keys) == 2


def test_fake_and_meta_tensors_have_fake_results(straight):
    with torch.no_grad():
        assert library.call(
            rms_norm_op, torch.empty(3, 40, device="meta"), torch.empty(40, device="meta"), 1e-6
        ).is_meta
        with torch._subclasses.FakeTensorMode():
            out = library.call(rms_norm_op, torch.empty(3, 40), torch.empty(40), 1e-6)
    assert type(out) is torch._subclasses.FakeTensor and straight == []
