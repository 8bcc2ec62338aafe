"""Integrity checks of architecture and weights: pruned and damaged models fail with the module named."""

import copy

import models
import pytest
import qvl_models
import torch
from damage import TEXT, VISION, scale_in, zero_in
from torch import nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

import qvl_model
from qvl_model import capacity


@pytest.fixture(scope="module")
def whole():
    return models.stock_model("odd")


@pytest.fixture(params=["stock", "accelerated"])
def model(request, whole):
    copied = copy.deepcopy(whole)
    return qvl_model.accelerate(copied) if request.param == "accelerated" else copied


def _other_layers(model, count):
    layers = model.model.language_model.layers
    model.model.language_model.layers = layers[:count]


def _resize_heads(model):
    """Two of six query heads and one of three key/value heads removed, cleanly, as structured pruning does."""
    attention, size = model.model.language_model.layers[1].self_attn, 24
    for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
        linear = getattr(attention, name)
        linear.weight = nn.Parameter(linear.weight[: heads * size].clone())
        linear.out_features = heads * size
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, : 4 * size].clone())
    attention.o_proj.in_features = 4 * size


def _narrow_mlp(model):
    mlp = model.model.language_model.layers[2].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight[:90].clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :90].clone())


def _masked(model):
    from torch.nn.utils import prune

    prune.ln_structured(model.model.language_model.layers[0].mlp.gate_proj, "weight", amount=0.1, n=2, dim=0)


class _Skip(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


class _Disguised(Qwen3VLTextDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def _disguise(model):
    model.model.language_model.layers[3].__class__ = _Disguised


def _replace_forward(model):
    model.model.language_model.layers[3].forward = lambda hidden_states, *args, **kwargs: hidden_states


def _set(path, module):
    def damage(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)

    return damage


def _same_layer(model):
    model.model.language_model.layers[4] = model.model.language_model.layers[1]


def _copied_layer(model):
    model.model.language_model.layers[4].load_state_dict(model.model.language_model.layers[1].state_dict())


def _tied_weight(model):
    layers = model.model.language_model.layers
    layers[4].mlp.up_proj.weight = layers[1].mlp.up_proj.weight


def _copied_weight(model):
    with torch.no_grad():
        model.model.visual.blocks[3].mlp.linear_fc1.weight.copy_(model.model.visual.blocks[0].mlp.linear_fc1.weight)


def _vision_heads(model):
    attention = model.model.visual.blocks[2].attn
    attention.num_heads, attention.head_dim = 6, 10


def _extra_layer(model):
    layers = model.model.language_model.layers
    layers.append(copy.deepcopy(layers[0]))


def _zero_norm(model):
    with torch.no_grad():
        model.model.language_model.layers[2].input_layernorm.weight.zero_()


def _fill_in(path, value, place=slice(None), own_name="weight"):
    def damage(model):
        with torch.no_grad():
            getattr(model.get_submodule(path), own_name)[place] = value

    return damage


def _attribute(path, **values):
    return lambda model: vars(model.get_submodule(path)).update(values)


def _small_norm(model):
    with torch.no_grad():
        model.model.language_model.layers[2].input_layernorm.weight.mul_(1e-20)


DAMAGE = {
    "zeroed query head": (
        zero_in(f"{TEXT}.2.self_attn.q_proj", slice(72, 96)),
        f"{TEXT}.2.self_attn.q_proj",
        "head 3 is pruned",
    ),
    "zeroed value head": (
        zero_in(f"{TEXT}.0.self_attn.v_proj", slice(24, 48)),
        f"{TEXT}.0.self_attn.v_proj",
        "head 1 of the key/value",
    ),
    "zeroed head output": (
        zero_in(f"{TEXT}.4.self_attn.o_proj", columns=slice(0, 24)),
        f"{TEXT}.4.self_attn.o_proj",
        "head 0 is pruned",
    ),
    "zeroed vision keys": (
        zero_in(f"{VISION}.1.attn.qkv", slice(60, 80)),
        f"{VISION}.1.attn.qkv",
        "head 0 of the keys",
    ),
    "zeroed vision head": (
        zero_in(f"{VISION}.3.attn.proj", columns=slice(40, 60)),
        f"{VISION}.3.attn.proj",
        "head 2 is pruned",
    ),
    "zeroed row of a head": (
        zero_in(f"{TEXT}.2.self_attn.q_proj", 5),
        f"{TEXT}.2.self_attn.q_proj",
        "output channel 5 of 144 is",
    ),
    "zeroed MLP channel": (zero_in(f"{TEXT}.1.mlp.up_proj", 17), f"{TEXT}.1.mlp.up_proj", "output channel 17 of 100"),
    "zeroed MLP channels": (
        zero_in(f"{TEXT}.1.mlp.down_proj", columns=slice(3, 40)),
        f"{TEXT}.1.mlp.down_proj",
        "and 29 more of 100 are",
    ),
    "zeroed vision channel": (
        zero_in(f"{VISION}.0.mlp.linear_fc1", 75),
        f"{VISION}.0.mlp.linear_fc1",
        "output channel 75",
    ),
    "zeroed patch channel": (
        zero_in("model.visual.patch_embed.proj", 7),
        "model.visual.patch_embed.proj",
        "output channel 7",
    ),
    "zeroed embedding channel": (
        zero_in("model.language_model.embed_tokens", columns=9),
        "model.language_model.embed_tokens",
        "channel 9",
    ),
    "zeroed merger": (zero_in("model.visual.merger.linear_fc2"), "model.visual.merger.linear_fc2", "is all zero"),
    "zeroed deepstack": (
        zero_in("model.visual.deepstack_merger_list.1.linear_fc1"),
        "model.visual.deepstack_merger_list.1.linear_fc1",
        "is all zero",
    ),
    "zeroed norm": (_zero_norm, f"{TEXT}.2.input_layernorm", "all zero"),
    "removed last layer": (lambda model: _other_layers(model, 4), f"{TEXT}.4", "missing"),
    "removed vision block": (
        lambda model: model.model.visual.blocks.__delitem__(1),
        "model.visual.blocks",
        "has 3 entries, the specification says 4",
    ),
    "identity layer": (
        _set(f"{TEXT}.3", nn.Identity()),
        f"{TEXT}.3",
        "is a Identity; a Qwen3VLTextDecoderLayer belongs here",
    ),
    "identity attention": (_set(f"{VISION}.2.attn", _Skip()), f"{VISION}.2.attn", "is a _Skip"),
    "identity activation": (_set(f"{TEXT}.0.mlp.act_fn", nn.Identity()), f"{TEXT}.0.mlp.act_fn", "is a Identity"),
    "disguised layer": (_disguise, f"{TEXT}.3", "neither transformers nor qvl"),
    "replaced forward": (_replace_forward, f"{TEXT}.3", "forward was replaced"),
    "resized heads": (_resize_heads, f"{TEXT}.1.self_attn.q_proj", "[96, 72], the specification says [144, 72]"),
    "regrouped heads": (_vision_heads, f"{VISION}.2.attn", "num_heads is 6, the specification says 3"),
    "narrower MLP": (_narrow_mlp, f"{TEXT}.2.mlp.down_proj", "[72, 90], the specification says [72, 100]"),
    "pruning masks": (_masked, f"{TEXT}.0.mlp.gate_proj", "its parameter weight is missing"),
    "shared layer": (_same_layer, f"{TEXT}.4", f"is the same module as {TEXT}.1"),
    "duplicated layer": (_copied_layer, f"{TEXT}.4", f"repeats the weights of {TEXT}.1"),
    "shared weight": (_tied_weight, f"{TEXT}.4.mlp.up_proj", f"the same tensor as {TEXT}.1.mlp.up_proj.weight"),
    "duplicated weight": (
        _copied_weight,
        f"{VISION}.3.mlp.linear_fc1",
        f"has the weights of {VISION}.0.mlp.linear_fc1",
    ),
    "added layer": (_extra_layer, f"{TEXT}.5", "does not belong here"),
    "NaN": (
        _fill_in(f"{TEXT}.2.mlp.up_proj", float("nan"), (7, 5)),
        f"{TEXT}.2.mlp.up_proj",
        "weight holds NaN or Inf in 1 of 100 rows",
    ),
    "Inf in a bias": (
        _fill_in(f"{VISION}.1.attn.qkv", float("inf"), 3, "bias"),
        f"{VISION}.1.attn.qkv",
        "bias holds NaN or Inf",
    ),
    "NaN in a norm": (
        _fill_in(f"{TEXT}.0.self_attn.k_norm", float("nan"), 1),
        f"{TEXT}.0.self_attn.k_norm",
        "weight holds NaN or Inf",
    ),
    "NaN in a table": (
        _fill_in("model.language_model.rotary_emb", float("nan"), 0, "inv_freq"),
        "model.language_model.rotary_emb",
        "inv_freq holds",
    ),
    "-Inf in a token": (
        _fill_in("model.language_model.embed_tokens", -float("inf"), (9, 9)),
        "model.language_model.embed_tokens",
        "in 1 of 160 rows",
    ),
    "faint query head": (
        scale_in(f"{TEXT}.2.self_attn.q_proj", 1e-20, slice(72, 96)),
        f"{TEXT}.2.self_attn.q_proj",
        "head 3 is pruned: its 24 rows are next",
    ),
    "faint head output": (
        scale_in(f"{TEXT}.4.self_attn.o_proj", 1e-20, columns=slice(0, 24)),
        f"{TEXT}.4.self_attn.o_proj",
        "its 24 columns are next",
    ),
    "faint vision values": (
        scale_in(f"{VISION}.1.attn.qkv", 1e-20, slice(120, 140)),
        f"{VISION}.1.attn.qkv",
        "head 0 of the values",
    ),
    "most heads faint": (
        scale_in(f"{TEXT}.2.self_attn.q_proj", 1e-20, slice(0, 96)),
        f"{TEXT}.2.self_attn.q_proj",
        "head 0 is pruned",
    ),
    "faint MLP channel": (
        scale_in(f"{TEXT}.1.mlp.up_proj", 1e-20, 17),
        f"{TEXT}.1.mlp.up_proj",
        "output channel 17 of 100 is next to nothing",
    ),
    "faint layer": (
        scale_in(f"{TEXT}.1.mlp.down_proj", 1e-20),
        f"{TEXT}.1.mlp.down_proj",
        "its weight is next to nothing",
    ),
    "faint merger": (
        scale_in("model.visual.merger.linear_fc2", 1e-20),
        "model.visual.merger.linear_fc2",
        "its weight is next to nothing",
    ),
    "faint norm": (_small_norm, f"{TEXT}.2.input_layernorm", "its weight is next to nothing"),
    "constant weight": (
        _fill_in(f"{TEXT}.3.mlp.gate_proj", 0.125),
        f"{TEXT}.3.mlp.gate_proj",
        "weight [100, 72] is constant: all of it is 0.125",
    ),
    "constant patches": (
        _fill_in("model.visual.patch_embed.proj", -1.0),
        "model.visual.patch_embed.proj",
        "is constant: all of it is -1",
    ),
    "no scaling": (
        _attribute(f"{TEXT}.3.self_attn", scaling=0.0),
        f"{TEXT}.3.self_attn",
        "scaling is 0.0, the specification says 0.204",
    ),
    "no vision scaling": (
        _attribute(f"{VISION}.0.attn", scaling=0),
        f"{VISION}.0.attn",
        "scaling is 0, the specification says 0.22",
    ),
    "no rotation": (
        _attribute("model.language_model.rotary_emb", attention_scaling=0.0),
        "model.language_model.rotary_emb",
        "attention_scaling is 0.0",
    ),
    "a norm of nothing": (
        _attribute(f"{TEXT}.1.input_layernorm", variance_epsilon=1e30),
        f"{TEXT}.1.input_layernorm",
        "variance_epsilon is 1e+30",
    ),
    "dead tokens": (
        zero_in("model.language_model.embed_tokens", slice(30, 50)),
        "model.language_model.embed_tokens",
        "and 12 more of 160 are all zero",
    ),
    "faint token": (
        scale_in("model.language_model.embed_tokens", 1e-20, 77),
        "model.language_model.embed_tokens",
        "row 77 of 160 is next to nothing",
    ),
    "dead end of the vocabulary": (
        zero_in("model.language_model.embed_tokens", slice(80, 160)),
        "model.language_model.embed_tokens",
        "of 160 are all zero",
    ),
    "dead position": (zero_in("model.visual.pos_embed", 5), "model.visual.pos_embed", "row 5 of 64 is all zero"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_pruned_models_fail(model, kind):
    damage, module, message = DAMAGE[kind]
    damage(model)
    with pytest.raises(capacity.CapacityError) as caught:
        capacity.verify(model, models.config("odd"))
    found = [v for v in caught.value.report.violations if v.module == module and message in v.problem]
    assert found, f"{module}: ...{message}... is not among\n{caught.value}"
    assert module in str(caught.value)


@pytest.fixture(params=["stock", "accelerated"])
def qvl(request):
    model = qvl_models.plain_model("attention")
    return qvl_model.accelerate(model) if request.param == "accelerated" else model


def _fusion(model, index=2):
    return model.model.language_model.layers[index].fusion


def _without_fusion(model):
    model.model.language_model.layers[2].fusion = None


def _close_gate(model):
    with torch.no_grad():
        _fusion(model).gate.zero_()


def _same_fusion(model):
    model.model.language_model.layers[2].fusion = _fusion(model, 0)


def _copied_attention(model):
    _fusion(model).attn.load_state_dict(_fusion(model, 0).attn.state_dict())


def _drop_query(model):
    with torch.no_grad():
        model.model.connector.queries[3] = 0


def _fewer_queries(model):
    model.model.connector.queries = nn.Parameter(model.model.connector.queries[:4].clone())


FUSION = "model.language_model.layers.2.fusion"


QVL_DAMAGE = {
    "zeroed cross-attention": (zero_in(f"{FUSION}.attn.o_proj"), f"{FUSION}.attn.o_proj", "is all zero"),
    "zeroed cross-attention head": (
        zero_in(f"{FUSION}.attn.q_proj", slice(9, 18)),
        f"{FUSION}.attn.q_proj",
        "head 1 is pruned",
    ),
    "removed cross-attention": (_without_fusion, FUSION, "missing; a QVLFusion belongs here"),
    "identity for cross-attention": (
        _set(f"{FUSION}.attn", nn.Identity()),
        f"{FUSION}.attn",
        "a QVLCrossAttention belongs here",
    ),
    "closed gate": (_close_gate, FUSION, "gate is closed"),
    "shared cross-attention": (_same_fusion, FUSION, "is the same module as model.language_model.layers.0.fusion"),
    "duplicated cross-attention": (
        _copied_attention,
        f"{FUSION}.attn.q_proj",
        "has the weights of model.language_model.layers.0.fusion.attn.q_proj",
    ),
    "zeroed connector head": (
        zero_in("model.connector.layers.1.attn.k_proj", slice(0, 10)),
        "model.connector.layers.1.attn.k_proj",
        "head 0 is pruned",
    ),
    "removed connector layer": (
        lambda model: model.model.connector.layers.__delitem__(1),
        "model.connector.layers",
        "has 1 entries, the specification says 2",
    ),
    "zeroed query": (_drop_query, "model.connector", "queries: row 3 of 5 is all zero"),
    "fewer queries": (_fewer_queries, "model.connector", "queries is [4, 20], the specification says [5, 20]"),
    "zeroed image channel": (zero_in("model.image_embed", columns=2), "model.image_embed", "channel 2 of 20"),
    "removed decoder layer": (
        lambda model: model.model.language_model.layers.__delitem__(1),
        "model.language_model.layers",
        "has 2 entries",
    ),
    "gate next to closed": (lambda model: _fusion(model).gate.data.fill_(1e-30), FUSION, "gate is closed (1e-30)"),
    "gate of NaN": (lambda model: _fusion(model).gate.data.fill_(float("nan")), FUSION, "gate holds NaN or Inf"),
    "faint cross-attention head": (
        scale_in(f"{FUSION}.attn.q_proj", 1e-20, slice(9, 18)),
        f"{FUSION}.attn.q_proj",
        "head 1 is pruned: its 9 rows are next",
    ),
    "no scaling": (_attribute(f"{FUSION}.attn", scaling=0.0), f"{FUSION}.attn", "scaling is 0.0"),
    "constant queries": (
        _fill_in("model.connector", 0.5, own_name="queries"),
        "model.connector",
        "queries [5, 20] is constant",
    ),
    "faint query": (
        lambda model: model.model.connector.queries.data[3].mul_(1e-20),
        "model.connector",
        "queries: row 3 of 5 is next to nothing",
    ),
    "zeroed decoder head": (
        zero_in("model.language_model.layers.0.self_attn.v_proj", slice(10, 20)),
        "model.language_model.layers.0.self_attn.v_proj",
        "head 1 is pruned",
    ),
    "zeroed vision head": (
        zero_in("model.visual.blocks.0.attn.proj", columns=slice(12, 24)),
        "model.visual.blocks.0.attn.proj",
        "head 1 is pruned",
    ),
}


@pytest.mark.parametrize("kind", QVL_DAMAGE)
def test_pruned_qvl_models_fail(qvl, kind):
    damage, module, message = QVL_DAMAGE[kind]
    damage(qvl)
    report = capacity.examine(qvl, qvl_models.config("attention"))
    assert [v for v in report.violations if v.module == module and message in v.problem], (
        f"{module}: ...{message}... is not among\n{report}"
    )
