"""The loss of a training step: stock's value and gradients, without logits unless they are read."""

import copy

import models
import pytest
import torch
from models import assert_close, relative

from qvl_model.modules.lazy_logits import LazyLogits

ROWS = ([5, (1, 4, 6), 3], [14], [3, (1, 2, 2), (1, 8, 6)])


def _labels(batch):
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    return labels


@pytest.fixture
def pair():
    return tuple(model.train() for model in models.pair())


@pytest.fixture
def no_logits(monkeypatch):
    monkeypatch.setattr(LazyLogits, "value", lambda self: pytest.fail("the logits were computed"))


@pytest.mark.parametrize(
    "options", [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(9)}], ids=["mean", "count", "tensor"]
)
def test_equals_stock_without_logits(pair, no_logits, options):
    batch, results = models.inputs(*ROWS), []
    for model in pair:
        loss = model(**batch, labels=_labels(batch), **options).loss
        loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad, model.model.visual.patch_embed.proj.weight.grad))
    for expected, ours in zip(*results):
        assert relative(ours, expected) < 5e-5


def test_looking_at_the_logits_computes_them_with_their_gradient(pair):
    batch, results = models.inputs(*ROWS), []
    for model in pair:
        out = model(**batch, labels=_labels(batch))
        assert out.logits.shape == (3, batch["input_ids"].shape[1], models.VOCABULARY) and out.logits.requires_grad
        (out.loss + out.logits.float().square().mean() + out.logits[:, -1].sum()).backward()
        results.append((out.logits.detach(), model.lm_head.weight.grad))
    for expected, ours in zip(*results):
        assert relative(ours, expected) < 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(pair, no_logits, dtype):
    batch, losses, gradients = models.inputs([9], [6]), [], []
    for model in pair:
        with torch.autocast("cpu", dtype):
            out = model(**batch, labels=_labels(batch))
        out.loss.backward()
        losses.append(out.loss.detach()), gradients.append(model.lm_head.weight.grad)
        assert out.loss.dtype == torch.float32 and out.logits.dtype == dtype
    assert (
        type(out.logits) is LazyLogits
        and type(out.logits.float()) is LazyLogits
        and out.logits.float().dtype == torch.float32
    )
    limit = 8 * torch.finfo(dtype).eps
    assert relative(losses[1], losses[0]) < limit and relative(gradients[1], gradients[0]) < limit


def test_evaluation_and_frozen_models_are_not_lazy(pair):
    _, fast = pair
    batch = models.inputs([5])
    assert type(fast(**batch).logits) is LazyLogits
    with torch.no_grad():
        assert type(fast(**batch).logits) is torch.Tensor
    frozen = copy.deepcopy(fast).requires_grad_(False)
    assert type(frozen(**batch).logits) is torch.Tensor
    assert type(fast.eval()(**batch).logits) is torch.Tensor


def test_another_loss_function_gets_logits(pair):
    stock, fast = pair
    batch = models.inputs([7])
    losses = []
    for model in pair:
        model.loss_function = lambda logits, labels, vocab_size, **_: logits.float().logsumexp(-1).mean()
        losses.append(model(**batch, labels=batch["input_ids"]).loss)
    assert_close(losses[1], losses[0])


def test_labels_out_of_range_are_refused(pair):
    _, fast = pair
    batch = models.inputs([7])
    with pytest.raises(ValueError, match="labels must lie in"):
        fast(**batch, labels=batch["input_ids"] + models.VOCABULARY)


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("unused", [False, True], ids=["plain", "find_unused_parameters"])
def test_distributed_data_parallel(tmp_path, unused, read):
    """DistributedDataParallel passes the outputs through an autograd function of its own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stock, fast = (model.train() for model in models.pair("small"))
        parallel = torch.nn.parallel.DistributedDataParallel(fast, find_unused_parameters=unused)
        batch = models.inputs([9])
        outs = [model(**batch, labels=batch["input_ids"]) for model in (parallel, stock)]
        loss, expected = (out.loss + out.logits.square().mean() if read else out.loss for out in outs)
        loss.backward(), expected.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert relative(loss.detach(), expected.detach()) < 5e-5
    assert relative(fast.lm_head.weight.grad, stock.lm_head.weight.grad) < 5e-5
