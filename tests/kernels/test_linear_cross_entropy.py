"""linear_cross_entropy on the CPU beyond the shared cases: chunks, ignored labels, huge logits."""

import pytest
import torch
from bounds import norm_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qvl_kernels
from qvl_kernels.ops.linear_cross_entropy import cpu

M, V, C = 21, 50, 16


def _inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, C, generator=generator).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, V, (M,), generator=generator)


def _limit(logits: torch.Tensor) -> float:
    """Error bound of a loss, from sums over hidden size and vocabulary."""
    return norm_error(torch.float32, C + V, exponent=float(logits.abs().max()))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        self.numel = max(self.numel, *sizes, 0)
        return out


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_chunks_add_up_and_logits_are_never_materialised(smoothing, monkeypatch):
    hidden, weight, labels = _inputs()
    logits = hidden.double() @ weight.double().t()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    monkeypatch.setattr(cpu, "CHUNK_LOGITS", 4 * V)  # tokens 4 by 4 forward, 9 words at a time backward
    with Largest() as largest:
        loss = qvl_kernels.linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing)
        grads = torch.autograd.grad(loss, (hidden, weight))
    assert largest.numel < M * V
    torch.testing.assert_close(loss.double(), expected, rtol=_limit(logits), atol=_limit(logits))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)


def test_frozen_head_computes_no_gradient_of_the_head():
    hidden, weight, labels = _inputs()
    weight.requires_grad_(False)
    qvl_kernels.linear_cross_entropy(hidden, weight, labels).backward()
    assert hidden.grad.isfinite().all() and weight.grad is None
    hidden, weight, labels = _inputs()
    qvl_kernels.linear_cross_entropy(hidden.detach(), weight, labels).backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("ignore_index", [-100, 0, 7, V + 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignore_index(ignore_index, reduction):
    hidden, weight, labels = _inputs()
    labels[::3] = ignore_index
    options = {"ignore_index": ignore_index, "reduction": reduction}
    logits = hidden.double() @ weight.double().t()
    expected = torch.nn.functional.cross_entropy(logits, labels, **options)
    loss = qvl_kernels.linear_cross_entropy(hidden, weight, labels, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=_limit(logits), atol=_limit(logits))
    expected_grads = torch.autograd.grad(expected.sum(), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), (hidden, weight)), expected_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [None, 0.0])
def test_all_ignored_as_in_torch(count):
    """The mean is NaN and the gradients are zero: a batch without a learned token must not end a training run."""
    hidden, weight, labels = _inputs()
    labels.fill_(-100)
    loss = qvl_kernels.linear_cross_entropy(hidden, weight, labels, reduction="sum")
    assert loss.item() == 0.0
    loss = qvl_kernels.linear_cross_entropy(hidden, weight, labels) if count is None else loss / count
    assert loss.isnan()
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_huge_logits():
    """Only differences between logits matter."""
    hidden, weight, labels = _inputs()
    hidden, weight = (3000 * hidden).detach().requires_grad_(), weight.detach()
    weight[1::2] = weight[::2]  # pairs of equal logits: losses of log 2 where the label is of the largest pair
    labels = (hidden @ weight.t()).argmax(1)
    loss = qvl_kernels.linear_cross_entropy(hidden, weight, labels, reduction="none")
    expected = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="none")
    assert (hidden @ weight.t()).abs().max() > 1e4 and (expected - 0.6931).abs().max() < 1e-3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,), (exact,) = (torch.autograd.grad(x.sum(), hidden) for x in (loss, expected))
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-5)
