"""Qwen3-VL through the Triton kernels: training steps and decoding of the accelerated model beside stock."""

import copy
import importlib
import pkgutil
import sys

import models
import pytest
import torch

import qvl_kernels
import qvl_model
from qvl_kernels import dispatch
from qvl_kernels.gpu import launch as gpu_launch
from qvl_model.generation import step_gpu

TINY = dict(
    heads=2, kv_heads=1, head_dim=16, hidden=32, mlp=40, layers=1, sections=[4, 2, 2], vision=(32, 2, 48), depth=1
)
ROWS = ([3, (1, 4, 2), 2], [5])  # an image, and padding
TRAINED = (
    [3, (1, 8, 10), 2],
    [9],
)  # M above 16 for every matmul: the interpreter is slow at GEMV kernels


@pytest.fixture
def pair(monkeypatch, device):
    """(stock, accelerated)"""
    monkeypatch.setitem(models.CONFIGS, "tiny", TINY)
    stock = models.stock_model("tiny").to(
        device
    )  # accelerated on the device: a machine with a GPU may lack the C++ extension
    return stock, qvl_model.accelerate(copy.deepcopy(stock))


def _batch(device, *rows) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in models.inputs(*(rows or ROWS)).items()}


def _launched(monkeypatch) -> set[str]:
    """Names of the kernels that are launched from now on."""
    for module in pkgutil.walk_packages(qvl_kernels.__path__, "qvl_kernels."):
        if "triton" in module.name or module.name.endswith(
            "launch"
        ):  # else it is loaded at its first call and keeps our function
            importlib.import_module(module.name)
    names, original = set(), gpu_launch.launch

    def launch(kernel, *args, **meta):
        names.add(kernel.__name__)
        original(kernel, *args, **meta)

    for name, module in list(sys.modules.items()):
        if name.startswith("qvl_kernels") and getattr(module, "launch", None) is original:
            monkeypatch.setattr(module, "launch", launch)
    return names


def _step(model, batch, optimizer, scaler=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step, which is then taken."""
    with torch.autocast(batch["input_ids"].device.type, torch.float16, enabled=scaler is not None):
        loss = model(**batch, labels=batch["input_ids"]).loss
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step() if scaler is None else (scaler.step(optimizer), scaler.update())
    optimizer.zero_grad()
    return loss.detach(), gradients


def _error(gradients, golden) -> float:
    squares = sum((gradients[name].double() - golden[name].double()).square().sum().item() for name in golden)
    return (squares / sum(x.double().square().sum().item() for x in golden.values())) ** 0.5


def test_gradients_of_three_training_steps(pair, device, monkeypatch):
    """Each after the updates of those before."""
    batch, launched = _batch(device, *TRAINED), _launched(monkeypatch)
    optimizers = [torch.optim.AdamW(model.train().parameters(), lr=1e-3) for model in pair]
    known = dispatch.fallbacks()
    for _ in range(3):
        expected_loss, expected = _step(pair[0], batch, optimizers[0])
        with qvl_kernels.use_backend("triton"):
            loss, gradients = _step(pair[1], batch, optimizers[1])
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).norm() <= 2e-4 * expected[name].norm() + 1e-6, name
    assert dispatch.fallbacks() == known
    assert {"_cross_entropy_kernel", "_swiglu_kernel", "_swiglu_backward_kernel"} <= launched


def test_a_step_of_fp16_with_a_scaled_loss(pair, device):
    """Autocast and GradScaler: at most 1.5 times as far from fp32 as stock is."""
    batch, (stock, ours) = _batch(device, *TRAINED), pair
    _, golden = _step(copy.deepcopy(stock).train(), batch, torch.optim.SGD(stock.parameters(), lr=0.0))
    results = []
    for model in (stock, ours):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.0)
        with qvl_kernels.use_backend("triton"):
            results.append(_step(model, batch, optimizer, torch.amp.GradScaler(device.type, init_scale=2.0**12))[1])
    expected, got = (_error(gradients, golden) for gradients in results)
    assert 0 < got < 1.5 * expected


@pytest.mark.parametrize("weights", [None, "int8"])
def test_generate(pair, device, weights, monkeypatch):
    """Prefill, then whole decode steps: the same tokens as stock's loop over the same weights."""
    batch, (stock, ours) = _batch(device), pair
    if weights is not None:
        batch = _batch(device, [5], [3])  # prefill rounds activations to int8 above M = 16
        ours = qvl_model.accelerate(ours, weights=weights)
        stock = copy.deepcopy(ours)
    options = dict(do_sample=False, max_new_tokens=3, pad_token_id=0)
    with qvl_kernels.use_backend("reference"):
        expected = stock.generate(**batch, **options)
    launched, known = _launched(monkeypatch), dispatch.fallbacks()
    with qvl_kernels.use_backend("triton"):
        assert torch.equal(ours.generate(**batch, **options), expected)
    assert ours in step_gpu._pools and dispatch.fallbacks() == known
    assert any("gemv" in name for name in launched) and any("decode" in name for name in launched)
