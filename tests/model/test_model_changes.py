"""State kept between calls: every change of what it depends on takes effect in the next call."""

import copy

import pytest
import qvl_models
import torch
from changes import WEIGHTS, hooked, names, noise
from models import assert_close, inputs, pair, relative, stock_model
from torch import nn
from transformers import DynamicCache
from transformers.models.qwen3_vl import modeling_qwen3_vl

import qvl_model
from qvl_model.compat import CACHE

BATCH = inputs([5, (1, 4, 6), 3])
IDS = torch.tensor([[3], [14], [15], [92], [65]])


def _run(model) -> list[torch.Tensor]:
    """Logits of a prompt with an image, of a loop over tokens, and of generate."""
    model.model.rope_deltas = None  # stock code keeps them between calls
    with torch.no_grad():
        cache = DynamicCache()
        steps = [model(input_ids=ids[None], **{CACHE: cache}).logits for ids in IDS]
        out = model.generate(
            **BATCH, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return [model(**BATCH).logits, torch.cat(steps, 1), torch.stack(out.logits)]


def _frequencies(change):
    def changed(model):
        for rotary in (model.model.language_model.rotary_emb, model.model.visual.rotary_pos_emb):
            change(rotary)

    return changed


def _replace_frequencies(rotary):
    rotary.inv_freq = rotary.inv_freq * 0.5


def _eps(model, value=0.3):
    text, visual = model.model.language_model, model.model.visual
    for norm in (text.layers[1].input_layernorm, text.layers[2].self_attn.k_norm, text.norm):
        norm.variance_epsilon = value
    visual.blocks[1].norm1.eps = visual.blocks[1].norm2.eps = visual.merger.norm.eps = value


def _scaling(model, kind=float):
    for attention in (model.model.language_model.layers[1].self_attn, model.model.visual.blocks[0].attn):
        attention.scaling = kind(attention.scaling * 2)


def _vision_heads(model):
    """head_dim is stored there, but only the constructor reads it, for the scaling."""
    _eps(model)
    attention = model.model.visual.blocks[0].attn
    attention.head_dim, attention.scaling = 4, 4**-0.5


def _activation(model):
    model.model.language_model.layers[1].mlp.act_fn = nn.ReLU()
    model.model.visual.blocks[1].mlp.act_fn = nn.ReLU()


LAYER, BLOCK = "model.language_model.layers.1", "model.visual.blocks.1"


def _not_parameters(keep):
    """Weights that are no parameters of their modules, as hypernetworks and parameter-sharding have them, changed once
    more after a call.
    """

    def changed(model):
        modules = [
            (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names(model)[:-1]
        ]
        modules.append((model.model.language_model.layers[0].mlp.gate_proj, "bias"))
        base = [None if getattr(module, name) is None else getattr(module, name).detach() for module, name in modules]
        for seed in (0, 100):
            for i, ((module, name), x) in enumerate(zip(modules, base)):
                if x is None:
                    x = torch.zeros(module.out_features)
                module._parameters.pop(name, None)
                module._buffers.pop(name, None)
                keep(module, name, (x * noise(x, seed + i)) if x.any() else noise(x, seed + i) - 1)
            if seed == 0:
                _run(model)

    return changed


class _Halved(nn.Module):
    def forward(self, x):
        return x / 2


def _other_norms(model):
    model.model.language_model.norm, model.model.visual.blocks[0].norm1 = nn.Identity(), _Halved()


CHANGES = {
    **WEIGHTS,
    "inv_freq in place": _frequencies(lambda rotary: rotary.inv_freq.mul_(0.5)),
    "inv_freq data": _frequencies(lambda rotary: rotary.inv_freq.data.mul_(0.5)),
    "inv_freq numpy": _frequencies(lambda rotary: rotary.inv_freq.numpy().__imul__(0.5)),
    "inv_freq": _frequencies(_replace_frequencies),
    "attention_scaling": _frequencies(lambda rotary: setattr(rotary, "attention_scaling", 1.3)),
    "eps": _eps,
    "scaling": _scaling,
    "activation": _activation,
    "plain tensors": _not_parameters(setattr),
    "buffers": _not_parameters(nn.Module.register_buffer),
    "plain tensors over parameters": lambda model: model.model.language_model.layers[1].mlp.up_proj.__dict__.update(
        weight=noise(torch.empty(100, 72), 1) / 8
    ),
    "eps as tensors": lambda model: _eps(model, torch.tensor(0.3)),
    "scaling as tensors": lambda model: _scaling(model, torch.tensor),
    "head_dim and scaling of the vision": _vision_heads,
    "hook on a norm": hooked(f"{LAYER}.post_attention_layernorm", f"{BLOCK}.norm1"),
    "hook on a linear": hooked(f"{LAYER}.self_attn.o_proj", f"{BLOCK}.mlp.linear_fc1"),
    "hook before a linear": hooked(f"{LAYER}.mlp.gate_proj", f"{BLOCK}.attn.qkv", pre=True),
    "hook on an attention": hooked(f"{LAYER}.self_attn", f"{BLOCK}.attn"),
    "hook on an MLP": hooked(f"{LAYER}.mlp", f"{BLOCK}.mlp"),
    "hook on a layer": hooked(LAYER, BLOCK),
    "hook on an activation": hooked(f"{LAYER}.mlp.act_fn", f"{BLOCK}.mlp.act_fn"),
    "hook on a table": hooked("model.language_model.rotary_emb", "model.visual.pos_embed"),
    "norms without eps or weight": _other_norms,
    "eager": lambda model: model.set_attn_implementation("eager"),
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_counts(name):
    stock, ours = pair()
    before = _run(ours)
    for model in (stock, ours):
        CHANGES[name](model)
    for got, expected, earlier in zip(_run(ours), _run(stock), before, strict=True):
        if name == "bfloat16":
            assert relative(got, earlier) <= 2 * relative(expected, earlier)
            continue
        assert_close(got, expected)
        assert name in ("eager", "float64") or relative(expected, earlier) > 1e-4


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("dtype", "lower"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
def test_autocast_comes_and_goes(dtype, lower, first):
    """State prepared outside autocast must not be used inside, nor the reverse, for GEMV and GEMM."""
    stock, ours = pair("small", dtype)
    exact = copy.deepcopy(stock).double()

    def run(model, rows, enabled):
        model.model.rope_deltas = None
        ids = IDS.T.repeat(rows, 1) + torch.arange(rows)[:, None]
        with torch.no_grad(), torch.autocast("cpu", lower, enabled=enabled):
            cache = DynamicCache()
            return torch.cat([model(input_ids=part, **{CACHE: cache}).logits for part in ids.split([3, 1, 1], 1)], 1)

    for rows in (1, 16, 17):
        golden = run(exact, rows, False)
        for enabled in (first, not first, first):
            got, expected = run(ours, rows, enabled), run(stock, rows, enabled)
            assert got.dtype is expected.dtype
            assert relative(got, golden) <= 1.5 * relative(expected, golden) + 2e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("place", ["model.language_model.layers.1.self_attn", "model.visual.blocks.1.attn"])
def test_groups_changed_by_hand(place, attention):
    """Stock code runs, or raises its own error."""
    results = []
    for model in pair("small", attention=attention):
        model.get_submodule(place).num_key_value_groups = 4
        try:
            with torch.no_grad():
                results.append(model(**BATCH).logits)
        except RuntimeError as error:
            results.append(str(error))
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        assert_close(results[1], results[0])


GRADIENTS = {
    "text": [
        "layers.1.mlp.up_proj.weight",
        "layers.0.input_layernorm.weight",
        "layers.1.self_attn.q_norm.weight",
        "layers.1.self_attn.v_proj.weight",
    ],
    "vision": [
        "blocks.1.mlp.linear_fc1.weight",
        "blocks.0.norm1.bias",
        "blocks.1.attn.qkv.bias",
        "patch_embed.proj.weight",
        "merger.norm.weight",
    ],
    "head": ["weight"],
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("part", GRADIENTS)
def test_gradients_of_what_plain_tensors_are_made_of(part, training):
    """base + delta in place of frozen weights, as hypernetworks and meta-learning make them."""
    found = []
    for model in pair("untied_bias"):
        model.requires_grad_(False).train(training)
        deltas = []
        for path in GRADIENTS[part]:
            module, _, name = path.rpartition(".")
            module = {"text": model.model.language_model, "vision": model.model.visual, "head": model.lm_head}[
                part
            ].get_submodule(module)
            base = getattr(module, name).detach().clone()
            delattr(module, name)
            deltas.append(torch.zeros_like(base, requires_grad=True))
            setattr(module, name, base + deltas[-1])
        loss = model(**BATCH, labels=BATCH["input_ids"]).loss
        loss.backward()
        found.append([loss.detach(), *(delta.grad for delta in deltas)])
    for expected, got in zip(*found, strict=True):
        assert expected.abs().sum() > 0
        assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("own", ["text", "vision", "both"])
def test_an_attention_function_registered_anew(name, own, monkeypatch):
    """Under a name that transformers uses: it calls the function registered last."""
    functions = modeling_qwen3_vl.ALL_ATTENTION_FUNCTIONS
    theirs = functions.get(name, modeling_qwen3_vl.eager_attention_forward)
    plain = _run(pair("small", attention=name)[0])

    def halved(module, q, k, v, *args, **kwargs):
        taken = own == "both" or own == ("vision" if "Vision" in type(module).__name__ else "text")
        return theirs(module, q, k, v * 0.5 if taken else v, *args, **kwargs)

    monkeypatch.setattr(functions, "_local_mapping", {**functions._local_mapping, name: halved})
    assert functions[name] is halved
    stock, ours = pair("small", attention=name)
    for got, expected, before in zip(_run(ours), _run(stock), plain, strict=True):
        assert_close(got, expected)
        assert own == "vision" or relative(expected, before) > 1e-3
    assert relative(expected, before) > 1e-3  # generate, with an image


@pytest.mark.parametrize(
    "path",
    [
        "language_model.layers.1.mlp.up_proj.weight",
        "visual.blocks.1.attn.qkv.weight",
        "language_model.layers.0.self_attn.k_proj.weight",
    ],
)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("when", ["before a call", "after a call"])
def test_freed_weights_are_stocks_error(path, when, grad):
    errors = []
    for model in pair("small"):
        if when == "after a call":
            _run(model)
        model.model.get_parameter(path).untyped_storage().resize_(0)
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as caught:
            model(**BATCH)
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and "setStorage" in errors[0]


@pytest.mark.parametrize("family", [pair, qvl_models.pair])
@pytest.mark.parametrize("shape", [(2, 0), (0, 20)])
def test_no_tokens_are_stocks_error(shape, family):
    errors = []
    for model in family("small" if family is pair else "mlp"):
        for text in (
            {"input_ids": torch.zeros(shape, dtype=torch.long)},
            {"inputs_embeds": torch.zeros(*shape, model.config.get_text_config().hidden_size)},
        ):
            with torch.no_grad(), pytest.raises(RuntimeError) as caught:
                model(**text)
            errors.append(str(caught.value))
    assert errors[:2] == errors[2:] and "cannot reshape tensor of 0 elements" in errors[0]


def _quantised(weights):
    return qvl_model.accelerate(stock_model("small"), weights=weights)


QUANTISED = {
    "scales in place": lambda m: [b.mul_(1.25) for n, b in m.named_buffers() if n.endswith("weight_scales")],
    "scales by data": lambda m: [b.data.mul_(1.25) for n, b in m.named_buffers() if n.endswith("weight_scales")],
    "values in place": lambda m: [b.bitwise_and_(-16) for n, b in m.named_buffers() if n.endswith("weight_values")],
    "values by numpy": lambda m: [
        b.numpy().__iand__(-16 if b.dtype is torch.int8 else 0xF0)
        for n, b in m.named_buffers()
        if n.endswith("weight_values")
    ],
    "load": lambda m: m.load_state_dict(
        {n: x * 1.5 if x.is_floating_point() else x for n, x in m.state_dict().items()}
    ),
    "norm": lambda m: m.model.language_model.layers[1].input_layernorm.weight.data.mul_(1.5),
    "eps": lambda m: setattr(m.model.language_model.layers[1].input_layernorm, "variance_epsilon", 0.3),
}


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_change_of_quantised_weights_counts(name, weights):
    model = _quantised(weights)
    before = _run(model)
    with torch.no_grad():
        QUANTISED[name](model)
    fresh = _quantised(weights)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    if name == "eps":
        QUANTISED[name](fresh)
    for got, expected, earlier in zip(_run(model), _run(fresh), before, strict=True):
        assert torch.equal(got, expected) and relative(got, earlier) > 1e-4
