"""Properties that comparisons of results do not test: dropout sites and their p, memory kept by checkpointing, every
default.
"""

import dataclasses

import pytest
import torch
from models import relative
from qvl_models import CONFIGS, inputs, plain_model
from test_qvl_reference import DOUBLE, SINGLE, Float64, cast, double, reference
from torch import nn

import qvl_model
from qvl_model.compat import CHECKPOINTING
from qvl_model.qvl import QVLConfig
from qvl_model.qvl.presets import PRESETS
from qvl_model.training import TrainConfig

# --- dropout ----------------------------------------------------------------------------------------------------------

HIDDEN, ATTENTION = 0.3, 0.2


def dropped(x: torch.Tensor, p: float) -> torch.Tensor:
    """Replaces dropout: every element gets its own factor, which depends on p."""
    return x * (1 + p * torch.arange(x.numel()).double().cos().view(x.shape)).to(x.dtype)


@pytest.fixture
def drawn(monkeypatch):
    """Replaces dropout by ``dropped``, and turns it off in PyTorch's attention; lists the p of every call, by kind."""
    calls = {"dropout": [], "sdpa": []}
    sdpa = nn.functional.scaled_dot_product_attention

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        calls["dropout"].append(p)
        return dropped(x, p)

    def attention(*args, dropout_p=0.0, **kwargs):
        if dropout_p > 0:
            calls["sdpa"].append(dropout_p)
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "dropout", dropout)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    return calls


def wanted(config: QVLConfig, *, images: bool, attention: str) -> dict[str, list[float]]:
    """Calls of one forward in training mode."""
    hidden, weights = config.hidden_dropout_prob, config.attention_probs_dropout_prob
    calls = {"dropout": [hidden], "sdpa": []}  # embeddings
    for i in range(config.num_hidden_layers):
        if images and i in config.cross_attention_layers:
            calls["dropout" if attention == "eager" else "sdpa"].append(weights)
            calls["dropout"].append(hidden)  # output of cross-attention
        calls["dropout" if attention == "eager" else "sdpa"].append(weights)
        calls["dropout"] += [hidden, hidden]  # outputs of attention and MLP
    return {kind: [p for p in found if p > 0] for kind, found in calls.items()}


NONE = {"dropout": [], "sdpa": []}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["float64", "plain", "accelerated"])
@pytest.mark.parametrize("hidden, weights", [(HIDDEN, ATTENTION), (HIDDEN, 0.0), (0.0, ATTENTION)])
def test_dropout_acts_where_the_formulas_say(drawn, name, kind, hidden, weights):
    """In training mode, with or without gradients; not in eval mode."""
    model = plain_model(name, attention="eager", hidden_dropout_prob=hidden, attention_probs_dropout_prob=weights)
    batch = inputs(7)
    expected = {
        training: golden.row(**next(golden.rows(batch))).logits
        for training, golden in ((True, reference(model, drop=dropped)), (False, reference(model)))
    }
    assert relative(expected[True], expected[False]) > 0.01
    if kind == "float64":
        model, batch, limit = double(model), cast(batch, torch.float64), DOUBLE
    else:
        model, limit = qvl_model.accelerate(model) if kind == "accelerated" else model, SINGLE
    for training, gradients in ((True, True), (True, False), (False, False)):
        for calls in drawn.values():
            calls.clear()
        with torch.set_grad_enabled(gradients), Float64() if kind == "float64" else torch.set_grad_enabled(gradients):
            logits = model.train(training)(**batch).logits.detach()
        assert relative(logits[0], expected[training]) < limit, (training, gradients)
        assert drawn == (wanted(model.config, images=True, attention="eager") if training else NONE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["plain", "accelerated"])
@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
def test_dropout_of_sdpa(drawn, name, kind, images):
    """PyTorch's attention draws its own keep mask: self- and cross-attention pass p in training mode, and no other
    does.
    """
    model = plain_model(name, hidden_dropout_prob=HIDDEN, attention_probs_dropout_prob=ATTENTION)
    model = qvl_model.accelerate(model) if kind == "accelerated" else model
    batch = inputs(6, 4, image=(9, 14) if images else None)
    for gradients in (True, False):
        for calls in drawn.values():
            calls.clear()
        with torch.set_grad_enabled(gradients):
            model.train()(**batch)
        assert drawn == wanted(model.config, images=images, attention="sdpa")
    for calls in drawn.values():
        calls.clear()
    model.eval().generate(**batch, max_new_tokens=2, do_sample=False)
    assert drawn == NONE


# --- checkpointing ----------------------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, part: str, batch: dict) -> int:
    """Bytes that the forward of a part keeps for its backward, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other storage gets its address
        return tensor

    visual = None
    if part != "visual":
        features, lengths = model.model.visual(batch["pixel_values"])
        visual = model.get_image_features(batch["pixel_values"])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if part == "visual":
            model.model.visual(batch["pixel_values"])
        elif part == "connector":
            model.model.connector(features, lengths)
        else:
            model.model.language_model(input_ids=batch["input_ids"], visual=visual)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)


@pytest.mark.parametrize("kind", ["plain", "accelerated"])
@pytest.mark.parametrize("name, part", [("mlp", "visual"), ("mlp", "language_model"), ("attention", "connector")])
def test_checkpointing_keeps_one_hidden_state_per_layer(name, part, kind):
    batch, kept, few, many = inputs(6), {}, 2, 5
    for layers in (few, many):
        sizes = dict(
            vision_num_hidden_layers=layers,
            num_hidden_layers=layers,
            cross_attention_layers=list(range(layers)),
            connector_num_layers=layers,
        )
        model = plain_model(name, **sizes)
        model = (qvl_model.accelerate(model) if kind == "accelerated" else model).train()
        kept[layers, False] = saved_bytes(model, part, batch)
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
        kept[layers, True] = saved_bytes(model, part, batch)
    config, patches = model.config, 4 * 5  # of 14 x 19 pixels
    elements = {
        "visual": patches * config.vision_hidden_size,
        "connector": config.num_query_tokens * config.vision_projection_dim,
        "language_model": 6 * config.hidden_size,
    }[part]
    assert kept[many, True] - kept[few, True] == (many - few) * 4 * elements
    assert kept[many, False] - kept[few, False] > 5 * (many - few) * 4 * elements


# --- defaults ---------------------------------------------------------------------------------------------------------

QVL_2B = dict(
    num_hidden_layers=32,
    num_attention_heads=32,
    hidden_size=2048,
    intermediate_size=5632,
    hidden_act="swish",
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    max_position_embeddings=32768,
    type_vocab_size=2,
    initializer_range=0.02,
    layer_norm_eps=1e-12,
    vocab_size=151936,
    num_key_value_heads=8,
    rope_theta=5e6,
    attention_bias=False,
    tie_word_embeddings=True,
    vision_model_type="vit",
    vision_num_hidden_layers=24,
    vision_num_attention_heads=16,
    vision_hidden_size=1024,
    vision_patch_size=16,
    vision_image_size=448,
    vision_intermediate_size=4096,
    vision_num_channels=3,
    vision_hidden_act="gelu_pytorch_tanh",
    vision_rope_theta=1e4,
    multimodal_fusion_type="cross_attention",
    num_query_tokens=256,
    vision_projection_dim=1024,
    language_projection_dim=2048,
    connector_type="attention",
    connector_num_layers=2,
    cross_attention_layers=[3, 7, 11, 15, 19, 23, 27, 31],
    cross_attention_gate_init=0.5,
    max_num_images=16,
    image_token_id=151655,
    use_cache=True,
    pad_token_id=151643,
    bos_token_id=None,
    eos_token_id=151645,
)
QVL_TINY = dict(
    num_hidden_layers=4,
    num_attention_heads=6,
    hidden_size=192,
    intermediate_size=512,
    hidden_act="swish",
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    max_position_embeddings=2048,
    type_vocab_size=2,
    initializer_range=0.07,
    layer_norm_eps=1e-12,
    vocab_size=384,
    num_key_value_heads=3,
    rope_theta=1e4,
    attention_bias=False,
    tie_word_embeddings=True,
    vision_model_type="vit",
    vision_num_hidden_layers=4,
    vision_num_attention_heads=4,
    vision_hidden_size=128,
    vision_patch_size=16,
    vision_image_size=96,
    vision_intermediate_size=512,
    vision_num_channels=3,
    vision_hidden_act="gelu_pytorch_tanh",
    vision_rope_theta=1e4,
    multimodal_fusion_type="cross_attention",
    num_query_tokens=0,
    vision_projection_dim=192,
    language_projection_dim=192,
    connector_type="mlp",
    connector_num_layers=2,
    cross_attention_layers=[1, 3],
    cross_attention_gate_init=0.5,
    max_num_images=4,
    image_token_id=6,
    use_cache=True,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=2,
)


def test_every_default_of_every_preset():
    own = {name for name in vars(QVLConfig)["__annotations__"] if not name.startswith("_")}
    assert own == set(QVL_2B) == set(QVL_TINY) and set(PRESETS) == {"qvl-2b", "qvl-tiny"}
    for config, literals in (
        (QVLConfig(), QVL_2B),
        (QVLConfig.from_preset("qvl-2b"), QVL_2B),
        (QVLConfig.from_preset("qvl-tiny"), QVL_TINY),
    ):
        assert {name: getattr(config, name) for name in literals} == literals


def test_every_default_of_training():
    config = TrainConfig.from_dict(
        {"data": {"train": "rows.jsonl"}, "run": {"steps": 1}, "output": {"directory": "out"}}
    )
    assert dataclasses.asdict(config) == {
        "model": dict(path=None, random_weights=False, accelerate=True, attention_dropout=None, hidden_dropout=None),
        "data": dict(
            train="rows.jsonl", validation=None, images=None, split=None, columns=None, max_length=2048, decode=True
        ),
        "optimizer": dict(
            learning_rate=1e-5,
            schedule="cosine",
            warmup=0.03,
            weight_decay=0.01,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            max_grad_norm=1.0,
        ),
        "run": dict(
            steps=1,
            epochs=None,
            batch_size=1,
            accumulation=8,
            precision="auto",
            gradient_checkpointing=False,
            sharding="ddp",
            device="auto",
            workers=0,
            seed=0,
        ),
        "output": dict(
            directory="out",
            log_every=10,
            save_every=500,
            keep=2,
            evaluate_every=None,
            capacity_every=500,
            tensorboard=False,
            progress=True,
        ),
    }
