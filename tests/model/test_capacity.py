"""Integrity checks of architecture and weights: complete models pass in every form of storage; reports and refusals."""

import copy

import models
import pytest
import qvl_models
import torch
import torch.distributed as dist
from damage import TEXT, VISION, scale_in, zero_in
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForImageTextToText

import qvl_model
from qvl_model import capacity, digits
from qvl_model.capacity.weights import storage_of


@pytest.fixture(scope="module")
def whole():
    return models.stock_model("odd")


@pytest.fixture(params=["stock", "accelerated"])
def model(request, whole):
    copied = copy.deepcopy(whole)
    return qvl_model.accelerate(copied) if request.param == "accelerated" else copied


def test_whole_models_pass(model):
    report = capacity.verify(model, models.config("odd"), training=True)
    assert report.ok and "complete" in str(report)
    assert (
        report.facts["model.language_model.layers (layers)"] == 5 and report.facts["model.visual.blocks (layers)"] == 4
    )
    assert report.facts["Qwen3VLTextAttention (heads)"] == "6 in each of 5"
    assert report.facts["Qwen3VLVisionAttention (heads)"] == "3 in each of 4"
    assert report.facts["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", models.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_config_passes(name, dtype):
    assert capacity.verify(models.stock_model(name, dtype), models.config(name)).ok


@pytest.mark.parametrize("name", qvl_models.CONFIGS)
def test_whole_qvl_models_pass(name):
    for model in qvl_models.pair(name):
        report = capacity.verify(model, qvl_models.config(name), training=True)
        assert report.facts["QVLCrossAttention (heads)"] == f"{model.config.num_attention_heads} in each of 2"


def test_gates_may_begin_closed_if_the_config_says_so():
    model = qvl_models.plain_model("mlp", cross_attention_gate_init=0.0)
    for layer in (1, 3):
        model.model.language_model.layers[layer].fusion.gate.data.zero_()
    assert capacity.verify(model).ok
    model.config.cross_attention_gate_init = 0.5
    assert not capacity.examine(model).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1, 1e-7])
def test_fresh_and_trained_models_pass(dtype, scale):
    """As ``from_config`` makes them: zero biases, norms of one, a row of zeros for padding; and with much smaller first
    weights.
    """
    for config in (models.config("small"), qvl_models.config("attention"), qvl_models.config("mlp")):
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            part.initializer_range = 0.02 * scale
        if hasattr(config, "text_config"):
            config.text_config.pad_token_id = 3
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).to(dtype)
        assert capacity.verify(model).ok and capacity.not_finite(model) == []


@pytest.mark.parametrize("name", digits.SHIPPED)
def test_shipped_models_pass(name):
    model = AutoModelForImageTextToText.from_pretrained(digits.SHIPPED[name], dtype="auto")
    assert capacity.verify(model).ok
    assert capacity.verify(qvl_model.accelerate(model, weights="int8")).ok


def test_a_vocabulary_may_be_rounded_up(whole):
    model = copy.deepcopy(whole)
    zero_in("model.language_model.embed_tokens", 159)(model)  # one of 160, at the end
    assert capacity.verify(model).ok
    zero_in("model.language_model.embed_tokens", 158)(model)
    assert not capacity.examine(model).ok


def test_a_quantised_model_is_read_too(whole):
    model = copy.deepcopy(whole)
    scale_in(f"{TEXT}.2.self_attn.q_proj", 1e-20, slice(72, 96))(model)
    model = qvl_model.accelerate(model, weights="int8")
    assert any("head 3 is pruned" in str(violation) for violation in capacity.examine(model).violations)
    layer = model.get_submodule(f"{TEXT}.0.mlp.up_proj")
    layer.weight_scales[4] = float("nan")
    assert capacity.not_finite(model) == [f"{TEXT}.0.mlp.up_proj.weight_scales"]
    assert any(
        "up_proj: weight holds NaN or Inf in 1 of 100 rows" in str(violation)
        for violation in capacity.examine(model).violations
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite(whole, dtype, value):
    model = copy.deepcopy(whole).to(dtype)
    assert capacity.not_finite(model) == []
    names = [f"{TEXT}.1.mlp.down_proj.weight", f"{VISION}.0.norm1.bias", "model.visual.patch_embed.proj.weight"]
    for name in names:
        model.get_parameter(name).data.view(-1)[-1] = value
    assert sorted(capacity.not_finite(model)) == sorted(names)
    with torch.device("meta"):
        assert capacity.not_finite(type(whole)(models.config("odd"))) == []


def test_a_zeroed_head_is_reported_once(whole):
    model = copy.deepcopy(whole)
    zero_in(f"{TEXT}.2.self_attn.q_proj", slice(72, 96))(model)
    assert len(capacity.examine(model).violations) == 1


def test_parameter_counts(whole):
    model = copy.deepcopy(whole)
    model.model.language_model.layers = model.model.language_model.layers[:3]
    report = capacity.examine(model, models.config("odd"))
    assert any(v.module == "" and "parameters" in v.problem for v in report.violations)


def test_a_config_that_was_pruned_too_needs_the_real_specification(whole):
    """Against its own, edited config a model with fewer layers is complete; against the specification it is not."""
    config = models.config("odd")
    config.text_config.num_hidden_layers = 3
    if hasattr(config.text_config, "layer_types"):
        config.text_config.layer_types = config.text_config.layer_types[:3]
    smaller = type(whole)(config)
    assert capacity.examine(smaller).ok
    assert not capacity.examine(smaller, models.config("odd")).ok


@pytest.mark.parametrize(
    "part", [f"{TEXT}.1.self_attn.k_proj", f"{VISION}.0.norm1", "model.language_model.embed_tokens"]
)
def test_frozen_parameters(whole, part):
    model = copy.deepcopy(whole)
    model.get_submodule(part).weight.requires_grad_(False)
    assert capacity.verify(model).ok
    with pytest.raises(capacity.CapacityError, match=f"{part}: weight is frozen"):
        capacity.verify(model, training=True)


def test_parameters_that_the_optimizer_lacks(whole):
    model = copy.deepcopy(whole)
    everything = list(model.parameters())
    assert capacity.verify(model, training=True, optimizer=torch.optim.AdamW(everything)).ok
    with pytest.raises(capacity.CapacityError, match="is not in the optimizer"):
        capacity.verify(model, training=True, optimizer=torch.optim.AdamW(everything[1:]))


def test_weights_without_gradient(whole):
    with torch.no_grad(), pytest.raises(capacity.CapacityError, match="switched off"):
        capacity.verify(whole, training=True)


class _Quantised(nn.Linear):
    """A linear layer that stores its weight in another format, as quantised ones do."""

    def dequantize(self):
        return self.stored.float()


_Quantised.__module__ = "qvl_model.quantization.modules"


def _pack(model):
    for module in list(model.modules()):
        if type(module) is nn.Linear and module is not model.lm_head:
            stored = module.weight.detach().to(torch.bfloat16)
            module.__class__ = _Quantised
            del module.weight
            module.register_buffer("stored", stored)


def test_quantised_weights(whole):
    model = copy.deepcopy(whole)
    _pack(model)
    report = capacity.verify(model, models.config("odd"))
    assert report.facts["parameters"] == sum(p.numel() for p in whole.parameters())
    with pytest.raises(capacity.CapacityError, match="quantised, which cannot be trained"):
        capacity.verify(model, training=True)
    model.get_submodule(f"{TEXT}.1.mlp.down_proj").stored[:, 5] = (
        0  # a column that is small in every row is quantised to this
    )
    assert capacity.verify(model).ok
    model.get_submodule(f"{TEXT}.2.self_attn.q_proj").stored[72:96] = 0
    with pytest.raises(capacity.CapacityError, match="head 3 is pruned"):
        capacity.verify(model)


def test_meta_models_are_compared_by_structure(whole):
    with torch.device("meta"):
        model = type(whole)(models.config("odd"))
    assert "meta" in capacity.verify(model, models.config("odd")).facts["weights"]
    model.model.language_model.layers[1] = nn.Identity()
    assert not capacity.examine(model, models.config("odd")).ok


def test_published_specification():
    counts = {size: capacity.CapacitySpec.of(f"qwen3-vl-{size}").count for size in ("4b", "8b", "32b")}
    # The published figures: 4.44, 8.77 and 33.4 billion.
    assert counts == {"4b": 4_437_815_808, "8b": 8_767_123_696, "32b": 33_357_390_064}
    spec = capacity.CapacitySpec.of("qwen3-vl-2b")
    assert spec.count == 2_127_532_032
    assert spec.modules["model.language_model.layers"][1] == {"entries": 28} and spec.modules["model.visual.blocks"][
        1
    ] == {"entries": 24}
    assert spec.modules["model.visual.blocks.0.attn"][1]["num_heads"] == 16
    qvl = capacity.CapacitySpec.of("qvl-2b")
    assert 2.0e9 <= qvl.count <= 2.3e9 and qvl.modules["model.language_model.layers"][1] == {"entries": 32}
    assert sum(kind.__name__ == "QVLCrossAttention" for kind, _ in qvl.modules.values()) == 8


def test_models_in_wrappers(whole):
    assert capacity.verify(torch.compile(whole), models.config("odd")).ok
    assert capacity.verify(whole.model, models.config("odd")).ok


def test_empty_shares_of_sharded_parameters_are_told_apart():
    """A gate is one number, so the second of two ranks holds an empty share: empty shares are not one shared tensor."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        mesh = dist.init_device_mesh("cpu", (2,))
        gates = [nn.Parameter(distribute_tensor(torch.rand(1), mesh, [Shard(0)], src_data_rank=None)) for _ in range(8)]
        assert all(gate.to_local().numel() == 0 for gate in gates)
        assert len({storage_of(gate) for gate in gates}) == 8 and storage_of(gates[0]) == storage_of(gates[0])
    finally:
        dist.destroy_process_group()


def test_what_is_refused(whole):
    with pytest.raises(TypeError, match="got Linear"):
        capacity.verify(nn.Linear(2, 2))
    with pytest.raises(
        ValueError,
        match="unknown specification 'qwen'; known are qwen3-vl-2b, .*, qvl-2b",
    ):
        capacity.verify(whole, "qwen")
    with pytest.raises(TypeError, match="described by Qwen3VLConfig"):
        capacity.verify(whole, models.config("odd").text_config)

    class Adapted(nn.Module):
        def get_base_model(self):
            return whole

    with pytest.raises(TypeError, match="merge_and_unload"):
        capacity.verify(Adapted())
