"""Backward hooks, and functions that users replace for all models: gradients, logits and losses are stock's."""

import pytest
import qvl_models
import torch
from models import inputs, pair, relative
from torch import nn
from torch.nn.modules import module as nn_module
from transformers.loss import loss_utils
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock_module

from qvl_model.qvl.vision import QVLVisionPositions

BATCH = inputs([5, (1, 4, 6), 3])
LAYER = "model.language_model.layers.1"
HOOKED = [
    LAYER,
    f"{LAYER}.self_attn.q_norm",
    f"{LAYER}.self_attn.k_proj",
    f"{LAYER}.mlp.act_fn",
    "model.visual.blocks.1.mlp.act_fn",
    "model.visual.patch_embed.proj",
    "model.language_model.norm",
    "lm_head",
]


def _gradients(model, batch, **options):
    model.train().zero_grad()
    torch.manual_seed(0)  # of dropout
    model(**batch, labels=batch["input_ids"], **options).loss.backward()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def _tripled(module, *gradients):
    return tuple(None if gradient is None else 3 * gradient for gradient in gradients[0])


def _assert_same_gradients(models, batch):
    expected, found = (_gradients(model, batch) for model in models)
    assert relative(found, expected) < 2e-5
    return expected


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("name", HOOKED)
def test_backward_hooks_count(name, kind):
    models = pair("small")
    before = _assert_same_gradients(models, BATCH)
    handles = [getattr(model.get_submodule(name), kind)(_tripled) for model in models]
    hooked = _assert_same_gradients(models, BATCH)
    of_no_input = "patch_embed" in name and kind == "register_full_backward_hook"  # pixels need no gradient
    assert of_no_input or relative(hooked, before) > 1e-2
    for handle in handles:
        handle.remove()
    _assert_same_gradients(models, BATCH)


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_backward_hooks_of_all_modules_count(kind):
    calls = []
    handle = getattr(nn_module, f"register_module_{kind}")(lambda *_: calls.append(1))
    try:
        models = pair("small")
        _gradients(models[0], BATCH)
        expected = len(calls)
        _assert_same_gradients(models, BATCH)
        assert len(calls) == 3 * expected
    finally:
        handle.remove()


def test_backward_hooks_of_qvl_count():
    models, batch = qvl_models.pair(), qvl_models.inputs(9, 5)
    before = _assert_same_gradients(models, batch)
    for model in models:
        model.get_submodule(f"{LAYER}.mlp.act_fn").register_full_backward_hook(_tripled)
    assert relative(_assert_same_gradients(models, batch), before) > 1e-2


def _scaled(own):
    return lambda *args, **kwargs: own(*args, **kwargs) * 1.25


def _called_and_scaled(own):
    """Outputs of Linear layers only: others are no tensors."""

    def call(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        return out * 1.25 if isinstance(self, nn.Linear) else out

    return call


PATCHES = {
    "scaled_dot_product_attention": (nn.functional, _scaled),
    "linear": (nn.functional, _scaled),
    "layer_norm": (nn.functional, _scaled),
    "silu": (nn.functional, _scaled),
    "gelu": (nn.functional, _scaled),
    "Linear": (nn.Linear, _scaled),
    "LayerNorm": (nn.LayerNorm, _scaled),
    "Conv3d": (nn.Conv3d, _scaled),
    "SiLU": (type(stock_module.ACT2FN["silu"]), _scaled),
    "GELU": (type(stock_module.ACT2FN["gelu_pytorch_tanh"]), _scaled),
    "__call__": (nn.Module, _called_and_scaled),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches_of_pytorch_count(name, monkeypatch):
    """With gradients and without."""
    models = pair("small")
    owner, replacement = PATCHES[name]
    with torch.no_grad():
        before = models[0](**BATCH).logits
    attribute = name if owner is nn.functional or name == "__call__" else "forward"
    monkeypatch.setattr(owner, attribute, replacement(getattr(owner, attribute)))
    with torch.no_grad():
        expected, found = (model(**BATCH).logits for model in models)
    assert relative(found, expected) < 2e-5 and relative(expected, before) > 1e-3
    _assert_same_gradients(models, BATCH)


def test_a_patched_function_of_attention_counts(monkeypatch):
    models = pair("small", attention="eager")
    own = stock_module.repeat_kv
    monkeypatch.setattr(stock_module, "repeat_kv", lambda hidden, count: own(hidden, count) * 0.5)
    with torch.no_grad():
        expected, found = (model(**BATCH).logits for model in models)
    assert relative(found, expected) < 2e-5


LOSSES = {
    "fixed_cross_entropy": (loss_utils, lambda own: lambda *args, **kwargs: 2 * own(*args, **kwargs)),
    "cross_entropy": (
        nn.functional,
        lambda own: lambda *args, **kwargs: own(*args, **{**kwargs, "label_smoothing": 0.1}),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_patched_losses_count(name, monkeypatch):
    models = [model.train() for model in pair("small")]
    plain = models[0](**BATCH, labels=BATCH["input_ids"]).loss.item()
    owner, replacement = LOSSES[name]
    monkeypatch.setattr(owner, name, replacement(getattr(owner, name)))
    expected, found = (model(**BATCH, labels=BATCH["input_ids"]).loss.item() for model in models)
    assert found == pytest.approx(expected, rel=1e-5) and abs(expected - plain) > 1e-2
    _assert_same_gradients(models, BATCH)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("part", ["model.language_model.rotary_emb", "model.visual.rotary_pos_emb"])
def test_angles_that_learn(part, frozen):
    """Kernels have no gradient of cos and sin."""
    gradients = []
    for model in pair("small"):
        model.requires_grad_(not frozen)
        frequencies = model.get_submodule(part).inv_freq.requires_grad_()
        logits = model(**BATCH).logits
        if not logits.requires_grad:
            gradients.append(None)
            continue
        logits.square().sum().backward()
        gradients.append(frequencies.grad)
    if gradients[0] is None:
        assert gradients[1] is None
    else:
        assert relative(gradients[1], gradients[0]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_image_positions_do_not_depend_on_the_default_dtype(dtype):
    table = QVLVisionPositions(qvl_models.config())
    table.side = 28
    table.positions = nn.Parameter(torch.randn(28, 28, 8))
    expected = table(37, 50)
    torch.set_default_dtype(dtype)
    try:
        assert table(37, 50).equal(expected)
    finally:
        torch.set_default_dtype(torch.float32)
