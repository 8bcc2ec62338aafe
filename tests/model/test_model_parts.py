"""accelerate(mlp_rows=...): chunked MLP, recomputed in the backward."""

import copy
import pickle

import models
import pytest
import torch
from models import assert_close

import qvl_kernels
import qvl_model
from qvl_model.modules import chunked_mlp

ROWS = ([5, (1, 4, 6), 3], [14])


@pytest.fixture
def sizes(monkeypatch):
    """Tokens of every call of an MLP's activation."""
    seen = []
    for name in ("swiglu", "gelu_tanh"):

        def spy(x, *args, original=getattr(qvl_kernels, name)):
            seen.append(x.numel() // x.shape[-1])
            return original(x, *args)

        monkeypatch.setattr(qvl_kernels, name, spy)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing, sizes):
    stock = models.stock_model("small")
    fast = qvl_model.accelerate(copy.deepcopy(stock), mlp_rows=7)
    batch, results = models.inputs(*ROWS), []
    for model in (stock, fast):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(**batch, labels=batch["input_ids"]).loss
        forward = len(sizes)
        loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    text, patches = batch["input_ids"].numel(), len(batch["pixel_values"])
    calls = 3 * -(-text // 7) + 4 * -(-patches // 7)  # 3 layers, 4 vision blocks
    assert max(sizes) == 7 and forward == calls
    assert (
        2 * calls < len(sizes) <= 3 * calls if checkpointing else len(sizes) == 2 * calls
    )  # each chunk again in the backward
    for name, gradient in results[1].items():
        assert (gradient - results[0][name]).norm() <= 5e-5 * results[0][name].norm() + 1e-7, name


@torch.no_grad()
def test_inference_op_by_op(sizes):
    stock, fast = models.pair("small")
    qvl_model.accelerate(fast, mlp_rows=5)
    for path, width in (("model.language_model.layers.1.mlp", 64), ("model.visual.blocks.2.mlp", 32)):
        x = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(0))
        assert_close(fast.get_submodule(path)(x), stock.get_submodule(path)(x))
        assert_close(fast.get_submodule(path)(x[:1, :4]), stock.get_submodule(path)(x[:1, :4]))
    assert sizes == [5, 5, 5, 3, 4] * 2


def test_fused_calls_give_way_on_gpus_only(monkeypatch):
    _, fast = models.pair("small")
    mlp, x = qvl_model.accelerate(fast, mlp_rows=5).model.language_model.layers[0].mlp, torch.zeros(2, 3, 64)
    assert not chunked_mlp.splits(mlp, x)
    monkeypatch.setattr(chunked_mlp.dispatch, "forced", lambda: "triton")  # as on a GPU
    assert chunked_mlp.splits(mlp, x) and not chunked_mlp.splits(mlp, x[:, :2])
    layer, batch = fast.model.language_model.layers[0], models.inputs([9])
    seen = []
    original = type(layer)._fused

    def fused(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        seen.append(out is not None)
        return out

    monkeypatch.setattr(type(layer), "_fused", fused)
    monkeypatch.setattr(chunked_mlp.dispatch, "forced", lambda: None)
    with torch.no_grad():
        fast(**batch)
        monkeypatch.setattr("qvl_model.modules.decoder_layer.splits", lambda *_: True)
        fast(**batch)
    assert seen == [True] * 3 + [False] * 3


def test_it_travels_and_goes():
    stock, fast = models.pair("small")
    qvl_model.accelerate(fast, mlp_rows=6)
    for model in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert model.model.language_model.layers[2].mlp.mlp_rows == model.model.visual.blocks[0].mlp.mlp_rows == 6
    assert fast.state_dict().keys() == stock.state_dict().keys()
    for undo in (qvl_model.accelerate, qvl_model.restore):
        assert not any(
            "mlp_rows" in module.__dict__ for module in undo(qvl_model.accelerate(fast, mlp_rows=6)).modules()
        )


@pytest.mark.parametrize(
    ("rows", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("8", TypeError)]
)
def test_bad_rows_change_nothing(rows, error):
    model = models.stock_model("small")
    with pytest.raises(error, match="mlp_rows"):
        qvl_model.accelerate(model, mlp_rows=rows)
    assert not qvl_model.is_accelerated(model)
