"""Training through the accelerated model: gradients, checkpointing, Trainer, adapters."""

import copy

import models
import pytest
import torch
from models import assert_close, relative

import qvl_model

ROWS = ([5, (1, 4, 6), 3], [14], [3, (1, 2, 2), (1, 8, 6)])


def _gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "checkpointing",
    [None, {"use_reentrant": False}, {"use_reentrant": True}],
    ids=["plain", "non-reentrant", "reentrant"],
)
def test_gradients(checkpointing):
    stock, fast = models.pair()
    batch = models.inputs(*ROWS)
    results = []
    for model in (stock, fast):
        model.train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        results.append(_gradients(model, batch))
    (stock_loss, expected), (loss, gradients) = results
    assert_close(loss, stock_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 5e-5 * expected[name].norm() + 1e-7, name


def test_frozen_vision_tower_is_fused_and_the_text_part_trains():
    stock, fast = models.pair()
    batch = models.inputs(*ROWS)
    for model in (stock, fast):
        model.model.visual.requires_grad_(False)
    (stock_loss, expected), (loss, gradients) = (_gradients(model, batch) for model in (stock, fast))
    assert_close(loss, stock_loss)
    assert gradients.keys() == expected.keys() and not any("visual" in name for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 5e-5 * expected[name].norm() + 1e-7, name


def _losses(prepare, tmp_path, dtype=torch.float32):
    from transformers import Trainer, TrainingArguments

    model = prepare(models.stock_model("small", dtype))
    row = models.inputs([11])["input_ids"][0]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=1e-3,
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row}] * 8)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(tmp_path):
    stock = [float(loss) for loss in _losses(lambda model: model, tmp_path)]
    fast = [float(loss) for loss in _losses(qvl_model.accelerate, tmp_path)]
    assert stock[-1] < stock[0]
    assert fast == pytest.approx(stock, rel=1e-3)


def _add_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "qkv"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("when", ["before", "after", "merged"])
def test_lora(when):
    plain, batch = models.stock_model(), models.inputs(*ROWS)
    stock = _add_lora(copy.deepcopy(plain))
    if when == "before":
        fast = qvl_model.accelerate(_add_lora(copy.deepcopy(plain)))
    else:
        fast = _add_lora(qvl_model.accelerate(copy.deepcopy(plain)))
    if when == "merged":
        stock, fast = stock.merge_and_unload(), fast.merge_and_unload()
        assert qvl_model.is_accelerated(fast)
    with torch.no_grad():
        expected, got = stock(**batch).logits, fast(**batch).logits
        assert_close(got, expected)
        assert relative(got, plain(**batch).logits) > 1e-2, "the adapter did nothing"


def test_lora_training():
    stock, fast = _add_lora(models.stock_model()), _add_lora(qvl_model.accelerate(models.stock_model()))
    batch = models.inputs(*ROWS)
    (stock_loss, expected), (loss, gradients) = (_gradients(model.train(), batch) for model in (stock, fast))
    assert_close(loss, stock_loss)
    assert gradients.keys() == expected.keys() and all("lora" in name for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 5e-5 * expected[name].norm() + 1e-7, name


def test_torch_func_grad():
    """Function transforms use wrapper tensors, which only PyTorch operations accept."""
    batch, results = {"input_ids": models.inputs([6])["input_ids"], "use_cache": False}, []
    for model in models.pair("small"):

        def loss(parameters, model=model):
            return torch.func.functional_call(model, parameters, kwargs=batch).logits.square().mean()

        results.append(torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()}))
    expected, gradients = results
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 5e-5 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_training_runs_on_the_kernels(parameters, monkeypatch):
    """As Trainer(bf16=True) does it: as close to fp32 as stock is, over the attention and norms of qvl_kernels."""
    import qvl_kernels

    calls = {name: 0 for name in ("attention", "rms_norm", "qk_norm_rope", "swiglu")}
    for name in calls:

        def counted(*args, name=name, original=getattr(qvl_kernels, name), **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(qvl_kernels, name, counted)
    stock, fast = (model.train() for model in models.pair())
    batch = models.inputs(*ROWS)
    _, golden = _gradients(stock, batch)
    results = []
    for model in (stock.to(parameters), fast.to(parameters)):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(_gradients(model, batch)[1])
    layers, blocks = len(fast.model.language_model.layers), len(fast.model.visual.blocks)
    assert calls == {"attention": layers + blocks, "rms_norm": 2 * layers + 1, "qk_norm_rope": layers, "swiglu": layers}

    def error(gradients):
        squares = sum((gradients[name].double() - golden[name].double()).square().sum() for name in golden)
        return (squares / sum(golden[name].double().square().sum() for name in golden)).sqrt()

    expected, got = map(error, results)
    assert 0 < got < 1.3 * expected
