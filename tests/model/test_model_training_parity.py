"""200 training steps on a tiny model: the loss curve of stock, on every backend of the CPU."""

import models
import pytest
import torch

import qvl_kernels
import qvl_model

STEPS = 200
ROWS = ([5, (1, 4, 6), 3], [14], [3, (1, 2, 2), (1, 8, 6)], [6, (1, 4, 4), 2])


def _curve(model) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    batches = [models.inputs(*ROWS, seed=seed) for seed in range(8)]
    losses = []
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def stock_curve():
    return _curve(models.stock_model("small"))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_loss_curve_equals_stock(backend, stock_curve):
    with qvl_kernels.use_backend(backend):
        curve = _curve(qvl_model.accelerate(models.stock_model("small")))
    assert stock_curve[-1] < 0.5 * stock_curve[0], "the model learns nothing"
    assert curve == pytest.approx(stock_curve, rel=2e-3)
