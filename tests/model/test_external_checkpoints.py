"""Checkpoints that other tools quantised: fp8 in blocks, AWQ, GPTQ and compressed-tensors."""

import copy
import json
import resource

import pytest
import torch
from external_checkpoints import INT4, integers, layer, section, write
from models import inputs, stock_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, FineGrainedFP8Config

import qvl_model
from qvl_kernels import quantization
from qvl_model import cli
from qvl_model.quantization import external
from qvl_model.quantization.modules import PackedLinear

load = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained


def _read(path, kind, stored, group, **changes):
    save_file({f"layer.{end}": tensor.contiguous() for end, tensor in stored.items()}, path / "model.safetensors")
    settings = section(kind, group) | changes
    return external.read(path, settings, weights=None, dtype=torch.float32, tied=False)[0]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", INT4)
def test_int4_is_loaded_exactly(tmp_path, kind, group):
    values, scales, zeros = integers(40, 3 * group, group, symmetric=kind == "symmetric")
    tensors = _read(tmp_path, kind, layer(kind, values, scales, zeros), group)
    assert tensors.keys() == {f"layer.weight_{end}" for end in ("values", "scales", "zeros")} - (
        {"layer.weight_zeros"} if kind == "symmetric" else set()
    )
    weight = quantization.QuantizedWeight(
        tensors["layer.weight_values"], tensors["layer.weight_scales"], 3 * group, tensors.get("layer.weight_zeros")
    )
    exact = (values - zeros.repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)
    assert weight.group == group and torch.equal(quantization.dequantize(weight), exact)


@pytest.mark.parametrize("kind", INT4)
def test_int4_models_compute_what_their_dense_weights_do(tmp_path, kind):
    dense = stock_model("small", torch.float32)
    write(dense, tmp_path, kind)
    model = load(tmp_path)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 7 * 3
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(model.get_submodule(name).weight.detach().clone(), module.weight), name
    batch = inputs([5, (1, 4, 6), 3], [14])
    with torch.no_grad():
        exact, found = dense.double()(**_double(batch)).logits, model(**batch).logits
    # what is left is the rounding of activations to int8
    assert (found - exact).norm() / exact.norm() < 0.05
    assert model.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3


def _double(batch):
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def test_int4_models_are_saved_in_qvls_format(tmp_path):
    write(stock_model("small"), tmp_path / "awq", "awq")
    model = load(tmp_path / "awq")
    model.save_pretrained(tmp_path / "qvl")
    again = load(tmp_path / "qvl")
    batch = inputs([5, (1, 4, 6), 3])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("name", ["small", "odd", "untied_bias"])
def test_fp8(tmp_path, name, weights):
    """Against the same numbers in float64: bf16 as stock's dequantised model, int8 close to it."""
    dense = stock_model(name, torch.bfloat16)
    write(dense, tmp_path, "fp8")
    _config(tmp_path, lambda config: config.pop("dtype"))  # published ones have it in text_config alone
    model = load(tmp_path, weights=weights)
    assert model.dtype == torch.bfloat16
    layers = [module for key, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in key]
    assert layers and all(isinstance(module, PackedLinear) == (weights is not None) for module in layers)
    stock = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    exact = copy.deepcopy(dense).double()
    with safe_open(tmp_path / "model.safetensors", "pt") as stream, torch.no_grad():
        for key, module in exact.named_modules():
            if f"{key}.weight_scale_inv" in stream.keys():
                values, scales = stream.get_tensor(f"{key}.weight"), stream.get_tensor(f"{key}.weight_scale_inv")
                wide = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
                module.weight.copy_(values.double() * wide[: values.shape[0], : values.shape[1]])
    batch = inputs([5, (1, 4, 6), 3], [14])
    with torch.no_grad():
        truth = exact(**_double(batch)).logits
        found, theirs = ((one(**batch).logits - truth).norm() / truth.norm() for one in (model, stock))
    assert found < {None: 1.1 * theirs + 1e-3, "int8": 2 * theirs + 0.03}[weights], (found, theirs)


def test_fp8_needs_no_bf16_copy_of_the_model(tmp_path):
    """The peak of memory over that of the int8 model is about one layer."""
    config = stock_model("small").config
    config.text_config.update({"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12})
    config.vision_config.out_hidden_size = 512
    model = qvl_model.api.Qwen3VLForConditionalGeneration(config).to(torch.bfloat16)
    write(model, tmp_path, "fp8")
    size = sum(module.weight.numel() for _, module in model.named_modules() if isinstance(module, nn.Linear))
    del model
    load(tmp_path, weights="int8")  # what libraries take, once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = load(tmp_path, weights="int8")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 1.6 * size and isinstance(loaded.lm_head, nn.Linear)


def test_fp8_from_the_command_line(tmp_path, capsys):
    write(stock_model("small", torch.bfloat16), tmp_path / "fp8", "fp8")
    cli.main(["inspect", str(tmp_path / "fp8")])
    assert "fp8" in capsys.readouterr().out
    assert not cli.main(["quantize", "--model", str(tmp_path / "fp8"), "--out", str(tmp_path / "int8")])
    batch = inputs([5, (1, 4, 6), 3])
    with torch.no_grad():
        ours, direct = load(tmp_path / "int8")(**batch).logits, load(tmp_path / "fp8")(**batch).logits
    assert (ours - direct).norm() / direct.norm() < 0.1


REFUSED = {
    "bits": ("awq", {"bits": 8}, "8 bits; qvl loads 4"),
    "group": ("gptq", {"group_size": -1}, "groups have -1 inputs"),
    "layout": ("awq", {"version": "gemv"}, "AWQ's gemv"),
    "symmetric awq": ("awq", {"zero_point": False}, "no zero-points"),
    "format": ("compressed-tensors", {"format": "marlin-24"}, "marlin-24"),
    "gptq layout": ("gptq", {"checkpoint_format": "marlin"}, "GPTQ's marlin"),
    "transforms": ("compressed-tensors", {"transform_config": {"config_groups": {}}}, "has a transform_config"),
    "cache": ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "has a kv_cache_scheme"),
    "groups": ("compressed-tensors", {"config_groups": {"W4A16": ["Linear"]}}, "says nothing about weights"),
    "no groups": ("compressed-tensors", {"config_groups": {}}, "no config_groups"),
    "static fp8": ("fp8", {"activation_scheme": "static"}, "static scales"),
    "fp8 by tensor": ("fp8", {"weight_block_size": None}, "weight_block_size is None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_settings_are_refused(tmp_path, case, capsys):
    kind, changes, message = REFUSED[case]
    write(stock_model("small"), tmp_path, kind)
    _config(tmp_path, lambda config: config["quantization_config"].update(changes))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def _config(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def _edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


EMBEDDING = "model.language_model.embed_tokens.weight"
LAYER = "model.language_model.layers.1.mlp.up_proj"


def _act_order(tensors):
    tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"].flip(0).contiguous()


def _cut(end):
    def change(tensors):
        tensors[f"{LAYER}.{end}"] = tensors[f"{LAYER}.{end}"][:, :-1].contiguous()

    return change


DAMAGE = {
    "act-order": ("gptq", _act_order, "up_proj does not fit.*act-order"),
    "no zeros": ("awq", lambda tensors: tensors.pop(f"{LAYER}.qzeros"), "its qzeros is missing"),
    "act-order without its order": ("gptq", None, "its g_idx is missing"),
    "no zero-points": (
        "compressed-tensors",
        lambda tensors: tensors.pop(f"{LAYER}.weight_zero_point"),
        "weight_zero_point is missing",
    ),
    "short zero-points": (
        "compressed-tensors",
        lambda tensors: tensors.update(
            {f"{LAYER}.weight_zero_point": tensors[f"{LAYER}.weight_zero_point"][:-1].clone()}
        ),
        "weight_zero_point does not hold",
    ),
    "other words": (
        "awq",
        lambda tensors: tensors.update({f"{LAYER}.qweight": tensors[f"{LAYER}.qweight"].long()}),
        "packed in int32",
    ),
    "other fp8 scales": (
        "fp8",
        lambda tensors: tensors.update({f"{LAYER}.weight_scale_inv": torch.ones(1, 1, dtype=torch.uint8)}),
        "weight_scale_inv must be fp32",
    ),
    "fp8 scales of NaN": (
        "fp8",
        lambda tensors: tensors[f"{LAYER}.weight_scale_inv"].fill_(torch.nan),
        "NaN",
    ),
    "no scales": (
        "fp8",
        lambda tensors: tensors.pop(f"{LAYER}.weight_scale_inv"),
        "up_proj.weight is torch.float8_e4m3fn",
    ),
    "short scales": ("awq", _cut("scales"), "up_proj does not fit"),
    "short values": ("compressed-tensors", _cut("weight_packed"), "up_proj does not fit"),
    "another size": (
        "gptq",
        lambda tensors: tensors.update(
            {
                f"{LAYER}.{end}": tensors[f"{LAYER.replace('up', 'down')}.{end}"].clone()
                for end in ("qweight", "qzeros", "scales", "g_idx")
            }
        ),
        "does not fit its config",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused(tmp_path, case):
    kind, change, message = DAMAGE[case]
    write(stock_model("small"), tmp_path, kind)
    if change is None:
        change = lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("g_idx")]  # noqa: E731
        _config(tmp_path, lambda config: config["quantization_config"].update(desc_act=True))
    _edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, weights="int8" if "NaN" in case else None)


def test_zero_points_as_older_compressed_tensors_store_them(tmp_path):
    values, scales, zeros = integers(40, 96, 32)
    stored = layer("compressed-tensors", values, scales, zeros)
    packed = _read(tmp_path, "compressed-tensors", stored, 32)
    plain = _read(tmp_path, "compressed-tensors", stored | {"weight_zero_point": (zeros - 8).to(torch.int8)}, 32)
    assert packed.keys() == plain.keys() and all(torch.equal(packed[name], plain[name]) for name in packed)


def test_a_tied_head_that_is_in_the_file(tmp_path):
    write(stock_model("small"), tmp_path, "awq")
    _edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    model = load(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    _edit(tmp_path, lambda tensors: tensors["lm_head.weight"].mul_(2))
    model = load(tmp_path)
    assert torch.equal(model.lm_head.weight, 2 * model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("weights", "message"), [("int5", "may be None"), ("int4", "may be None"), ({}, "may be None")]
)
def test_formats_of_fp8_weights(tmp_path, weights, message):
    write(stock_model("small"), tmp_path, "fp8")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, weights=weights)


@pytest.mark.parametrize("index", ["[1]", "{}", '{"weight_map": []}'])
def test_a_broken_index(tmp_path, index):
    write(stock_model("small"), tmp_path, "awq")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="weight_map|must hold a mapping"):
        load(tmp_path)


def test_several_files(tmp_path):
    write(stock_model("small"), tmp_path, "awq")
    expected = load(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load(tmp_path).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match="has no file model-2.safetensors"):
        load(tmp_path)


def test_gguf_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="does not load GGUF"):
        load(tmp_path, gguf_file="model-q4.gguf")
    with pytest.raises(ValueError, match="does not load GGUF"):
        load(tmp_path / "model-q4.gguf")
    assert cli.main(["generate", "--model", "model-q4.gguf", "--prompt", "x"]) == 2
    assert "is a GGUF file" in capsys.readouterr().err
