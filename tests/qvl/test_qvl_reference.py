"""QVL, stock and accelerated, against the fp64 reference ``helpers/qvl_reference.py`` (docs/qvl_formulas.md)."""

import copy

import pytest
import torch
from models import relative
from qvl_models import CONFIGS, IMAGE, PATCH, inputs, pad_pixels, pair, plain_model
from qvl_reference import Reference
from torch import nn
from torch.overrides import TorchFunctionMode

DOUBLE, SINGLE = 1e-10, 2e-5  # relative errors; the latter as in every comparison of fp32 with fp32

# Settings that an implementation could hard-code differ in some config; epsilons are as large as what they are added
# to.
ODD = {
    "mlp": ("mlp", {}),
    "attention": ("attention", {}),
    "epsilon": (
        "mlp",
        dict(
            layer_norm_eps=0.3,
            rope_theta=37.0,
            vision_rope_theta=5.0,
            hidden_act="silu",
            cross_attention_layers=[0, 1, 2],
        ),
    ),
    "attention epsilon": (
        "attention",
        dict(layer_norm_eps=0.2, num_key_value_heads=2, connector_num_layers=3, cross_attention_layers=[1]),
    ),
    "biases, untied": (
        "mlp",
        dict(attention_bias=True, tie_word_embeddings=False, num_key_value_heads=1, type_vocab_size=3),
    ),
    "one head": (
        "attention",
        dict(
            num_attention_heads=1,
            num_key_value_heads=1,
            vision_num_attention_heads=1,
            attention_bias=False,
            tie_word_embeddings=True,
            num_query_tokens=1,
            connector_num_layers=1,
            vision_num_hidden_layers=1,
        ),
    ),
    "other activations": (
        "mlp",
        dict(hidden_act="gelu", vision_hidden_act="relu", vision_patch_size=3, vision_image_size=15),
    ),
    "one position": (
        "attention",
        dict(vision_image_size=PATCH, hidden_act="relu", vision_hidden_act="gelu", image_token_id=None),
    ),
}


def images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pad_pixels(*(torch.randn(3, *size, generator=generator) for size in sizes))


def several() -> dict:
    """Rows of two images, of one in the second place, and of none; padding between and around the pixels; tokens hidden
    within a row.
    """
    batch = inputs(7, 5, 6, image=None, padding="right")
    batch["input_ids"][:, 2] = IMAGE
    batch["attention_mask"][0, 3] = 0
    generator = torch.Generator().manual_seed(5)
    pixels, mask = torch.full((3, 2, 3, 18, 22), float("nan")), torch.zeros(3, 2, 18, 22, dtype=torch.long)
    mask[0, 0, :, :], mask[0, 1, 3:9, 5:14], mask[1, 1, 8:, :13] = 1, 1, 1
    mask[0, 0, 4:10, 8:17] = 0  # a hole of whole patches and parts of others
    mask[1, 1, 12:16] = 0  # a row of patches within the box
    return {
        **batch,
        "pixel_values": torch.where(mask[:, :, None] > 0, torch.randn(pixels.shape, generator=generator), pixels),
        "pixel_attention_mask": mask,
    }


BATCHES = {
    "one": {key: value for key, value in inputs(6, image=(16, 16)).items() if key != "attention_mask"},
    "left": inputs(9, 4),
    "ragged": inputs(7, 3, 5, image=None) | images((9, 14), (0, 0), (16, 6)),
    "several": several(),
    "text": inputs(5, 8, image=None),
    "types": {
        **inputs(6, 5, image=(30, 3)),
        "token_type_ids": torch.randint(2, (2, 6), generator=torch.Generator().manual_seed(2)),
    },
}


class Float64(TorchFunctionMode):
    """Runs the model's fp32 computations in fp64, so an fp64 model is exact to its last digits."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        if function is torch.linspace:
            kwargs.setdefault("dtype", torch.float64)
        return function(*args, **kwargs)


def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def cast(batch: dict, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def reference(model: nn.Module, **options) -> Reference:
    return Reference(model.state_dict(), model.config.to_dict(), **options)


def seen_of(batch: dict) -> torch.Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def differences(out, golden: Reference, batch: dict) -> dict[str, float]:
    """The largest relative error of each output of a call."""
    errors: dict[str, float] = {}

    def compare(name: str, one: torch.Tensor, other: torch.Tensor) -> None:
        assert one.shape == other.shape, (name, one.shape, other.shape)
        errors[name] = max(errors.get(name, 0.0), relative(one, other))

    for i, (seen, arguments) in enumerate(zip(seen_of(batch), golden.rows(batch), strict=True)):
        row = golden.row(**arguments)
        compare("logits", out.logits[i, seen], row.logits)
        compare("pooler_output", out.pooler_output[i], row.pooler)
        for state, expected in zip(out.hidden_states, row.hidden_states, strict=True):
            compare("hidden_states", state[i, seen], expected)
        if out.attentions is None:
            continue
        for weights, expected in zip(out.attentions, row.attentions, strict=True):
            weights = weights[i, :, seen]
            compare("attentions", weights[:, :, seen], expected)
            assert not weights[:, :, ~seen].any()
        if arguments["tokens"] is None:
            assert not any(weights[i].any() for weights in out.cross_attentions)
            continue
        for weights, expected in zip(out.cross_attentions, row.cross_attentions, strict=True):
            keys = expected.shape[-1]
            compare("cross_attentions", weights[i, :, seen, :keys], expected)
            assert not weights[i, :, :, keys:].any()
    return errors


def assert_no_error(out, golden: Reference, batch: dict, limit: float) -> None:
    wrong = {name: f"{error:.1e}" for name, error in differences(out, golden, batch).items() if not error <= limit}
    assert not wrong, f"relative errors above {limit:.0e}: {wrong}"


def test_biases():
    """The reference has biases where the model has; the formulas list them."""
    for name, changes in (*ODD.values(), ("attention", {"attention_bias": False})):
        model = plain_model(name, **changes)
        for key, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                part = key.rpartition(".")[2]
                if "visual" in key or "connector" in key:
                    expected = part != "k_proj"
                else:
                    expected = (
                        model.config.attention_bias
                        and part in ("q_proj", "k_proj", "v_proj", "o_proj")
                        and not key.endswith("fusion.attn.o_proj")
                    )
                assert (module.bias is not None) == expected, key


@torch.no_grad()
def run(model: nn.Module, batch: dict, **options):
    return model(**batch, output_hidden_states=True, **options)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_plain_in_float64(odd, attention):
    name, changes = ODD[odd]
    model = double(plain_model(name, attention=attention, **changes))
    golden = reference(model)
    for batch in BATCHES.values():
        with Float64():
            out = run(model, cast(batch, torch.float64), output_attentions=True)
        assert_no_error(out, golden, batch, DOUBLE)


@pytest.mark.parametrize("odd", ODD)
def test_fp32(odd):
    name, changes = ODD[odd]
    plain, accelerated = pair(name, **changes)
    golden = reference(plain)
    for batch in BATCHES.values():
        for model in (plain, accelerated):
            assert_no_error(run(model, batch), golden, batch, SINGLE)
            assert_no_error(run(model, batch, output_attentions=True), golden, batch, SINGLE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    """Accelerated is no farther from the reference than stock; summed over weights and inputs to average out noise."""
    errors = {"plain": 0.0, "accelerated": 0.0}
    for seed in range(4):
        plain, accelerated = pair(name, dtype, seed=seed)
        batch = cast(inputs(9, 6, image=(18, 23), seed=seed), dtype)
        golden = reference(plain)
        for kind, model in (("plain", plain), ("accelerated", accelerated)):
            errors[kind] += differences(run(model, batch), golden, batch)["logits"] ** 2
    assert errors["plain"] ** 0.5 < 0.1 and errors["accelerated"] ** 0.5 <= 1.1 * errors["plain"] ** 0.5, errors


@pytest.mark.parametrize("odd", ["mlp", "attention", "epsilon", "biases, untied"])
@pytest.mark.parametrize("batch", ["left", "ragged", "text"])
def test_greedy_tokens(odd, batch):
    name, changes = ODD[odd]
    plain, accelerated = pair(name, **changes)
    batch, golden = BATCHES[batch], reference(plain)
    expected = golden.generate(batch, 6, use_cache=True)
    assert torch.equal(golden.generate(batch, 6, use_cache=False), expected)
    for model in (plain, accelerated):
        for cached in (True, False):
            out = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cached)
            assert torch.equal(out[:, -6:], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(name):
    """Gradients of the loss of all rows by every weight: stock in fp64, accelerated in fp32."""
    plain, accelerated = pair(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = BATCHES["ragged"]
    labels = batch["input_ids"].clone()
    for row, seen in enumerate(seen_of(batch)):
        labels[row, : seen.long().argmax() + 1] = -100  # nothing is before the first token
    weights = {key: value.detach().double().requires_grad_() for key, value in plain.named_parameters()}
    tied = (
        {} if "lm_head.weight" in weights else {"lm_head.weight": weights["model.language_model.embed_tokens.weight"]}
    )
    golden = Reference({**weights, **tied}, plain.config.to_dict())
    losses = [
        nn.functional.cross_entropy(golden.row(**row).logits[:-1], row["ids"][1:], reduction="sum")
        for row in golden.rows(batch)
    ]
    loss = sum(losses) / sum(len(row["ids"]) - 1 for row in golden.rows(batch))
    loss.backward()
    exact = double(plain).train()
    with Float64():
        found = exact(**cast(batch, torch.float64), labels=labels).loss
        found.backward()
    for model, value, limit in ((exact, found, 1e-9), (accelerated.train(), None, 1e-4)):
        if value is None:
            value = model(**batch, labels=labels).loss
            value.backward()
        assert relative(value, loss) < limit
        for key, parameter in model.named_parameters():
            assert relative(parameter.grad, weights[key].grad) < limit, key
