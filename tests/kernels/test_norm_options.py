"""Norms as other models have them: without weight, without bias, and with an offset on the weight."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

import qvl_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 72, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(72, generator=generator) * 0.3).to(dtype).requires_grad_()
    return x, weight


def _gradients(y, *tensors):
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, tensors, seed)]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_offset_is_that_of_gemma(dtype, backend):
    x, weight = _inputs(dtype)
    module = Gemma3RMSNorm(72, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    with qvl_kernels.use_backend(backend):
        found = _gradients(qvl_kernels.rms_norm(x, weight, eps=1e-5, offset=1.0), x, weight)
    expected = _gradients(module(x), x, module.weight)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.float() - theirs.float()).norm() <= 2 * torch.finfo(dtype).eps * theirs.float().norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_without_weight(dtype):
    x, _ = _inputs(dtype)
    ours = _gradients(qvl_kernels.rms_norm(x, eps=1e-5), x)
    theirs = _gradients(F.rms_norm(x, (72,), eps=1e-5), x)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other.float()).norm() <= 2 * torch.finfo(dtype).eps * other.float().norm()
    assert torch.equal(ours[0], qvl_kernels.rms_norm(x, torch.ones(72, dtype=dtype), eps=1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_weight", [False, True])
def test_layer_norm_without_bias(dtype, has_weight):
    x, weight = _inputs(dtype)
    weight = weight if has_weight else None
    learned = [x, weight] if has_weight else [x]
    ours = _gradients(qvl_kernels.layer_norm(x, weight, eps=1e-5), *learned)
    theirs = _gradients(F.layer_norm(x, (72,), weight, None, 1e-5), *learned)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other.float()).norm() <= 2 * torch.finfo(dtype).eps * other.float().norm()


@pytest.mark.parametrize("offset", [float("nan"), True, "1", float("inf")])
def test_bad_offsets(offset):
    with pytest.raises((TypeError, ValueError), match="offset"):
        qvl_kernels.rms_norm(torch.randn(2, 8), torch.ones(8), offset=offset)


@pytest.mark.parametrize("op", [qvl_kernels.rms_norm, qvl_kernels.layer_norm])
def test_bad_inputs_without_a_weight(op):
    for x in (None, (1.0, 2.0), torch.tensor(1.0), torch.ones(3, dtype=torch.int32)):
        with pytest.raises((TypeError, ValueError), match="x must"):
            op(x)


def test_compiles():
    x, weight = _inputs(torch.bfloat16)
    for options in ({"offset": 1.0}, {}):
        compiled = torch.compile(lambda x, w: qvl_kernels.rms_norm(x, w, **options), backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, weight), qvl_kernels.rms_norm(x, weight, **options))
