"""QVLConfig: presets, the specification's YAML, and refusals."""

import copy
import json

import pytest
import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from qvl_model.qvl import QVLConfig, QVLForConditionalGeneration, QVLModel
from qvl_model.qvl.config_file import GROUPS

# The three YAML blocks of the specification, verbatim.
SPECIFICATION = """
# Model

### Transformer Configuration
```yaml
model_type: qwen3_vl
num_hidden_layers: 32  # Preserved for full capacity
num_attention_heads: 32  # Preserved for full capacity
hidden_size: [to be specified]
intermediate_size: [to be specified]
hidden_act: "swish"  # Or appropriate activation
hidden_dropout_prob: 0.1
attention_probs_dropout_prob: 0.1
max_position_embeddings: [to be specified]
type_vocab_size: 2
initializer_range: 0.02
layer_norm_eps: 1e-12
```

### Vision Encoder Configuration
```yaml
vision_model_type: vit
vision_num_hidden_layers: [to be specified]
vision_num_attention_heads: [to be specified]
vision_hidden_size: [to be specified]
vision_patch_size: [to be specified]
vision_image_size: [to be specified]
vision_intermediate_size: [to be specified]
```

### Multimodal Configuration
```yaml
multimodal_fusion_type: cross_attention
num_query_tokens: [to be specified]
vision_projection_dim: [to be specified]
language_projection_dim: [to be specified]
```
"""
FIXED = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "swish",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "vision_model_type": "vit",
    "multimodal_fusion_type": "cross_attention",
}
SPEC_KEYS = [
    line.split(":")[0] for line in SPECIFICATION.splitlines() if ": " in line and not line.startswith("model_type")
]


def tiny(**changes) -> QVLConfig:
    return QVLConfig.from_preset("qvl-tiny", **changes)


def test_qvl_2b_is_what_the_specification_says():
    config = QVLConfig.from_preset("qvl-2b")
    assert {key: getattr(config, key) for key in FIXED} == FIXED
    assert config.vocab_size == 151936
    assert all(getattr(config, key) not in (None, "to be specified") for key in SPEC_KEYS)


def test_qvl_2b_has_exactly_so_many_parameters():
    with torch.device("meta"):
        model = QVLForConditionalGeneration(QVLConfig.from_preset("qvl-2b"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_159_034_376
    layers = model.model.language_model.layers
    assert len(layers) == 32
    for layer in layers:
        assert layer.self_attn.q_proj.out_features == 32 * layer.self_attn.head_dim == 2048
    fused = [i for i, layer in enumerate(layers) if layer.fusion is not None]
    assert fused == [3, 7, 11, 15, 19, 23, 27, 31]
    assert all(layers[i].fusion.attn.q_proj.out_features == 32 * layers[i].fusion.attn.head_dim for i in fused)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_qvl_2b_by_hand():
    """The parameter count by hand, from the formula."""
    c = QVLConfig.from_preset("qvl-2b")
    width, kv, vision, tokens = (
        c.hidden_size,
        c.num_key_value_heads * c.head_dim,
        c.vision_hidden_size,
        c.vision_projection_dim,
    )
    mlp = c.vision_intermediate_size
    decoder = 2 * width * width + 2 * width * kv + 3 * width * c.intermediate_size + 2 * width + 2 * c.head_dim
    block = 4 * vision * vision + 4 * vision + 2 * vision * mlp + mlp + vision + 4 * vision
    side = c.vision_image_size // c.vision_patch_size
    tower = 24 * block + 3 * 16 * 16 * vision + vision + side * side * vision + 2 * vision
    reader = (
        2 * (4 * tokens * tokens + 3 * tokens + 2 * tokens * mlp + mlp + tokens + 4 * tokens)
        + 256 * tokens
        + 2 * tokens
    )
    cross = 2 * width * c.language_projection_dim + 2 * tokens * kv + 2 * 64 + width + 1
    text = c.vocab_size * width + 2 * width + 32 * decoder + 8 * cross + width
    assert tower + reader + c.max_num_images * tokens + text == 2_159_034_376


def test_specification_is_read_as_it_stands(tmp_path):
    file = tmp_path / "spec.md"
    file.write_text(SPECIFICATION)
    assert QVLConfig.from_yaml(file, fill="qvl-2b").to_dict() == QVLConfig.from_preset("qvl-2b").to_dict()
    with pytest.raises(ValueError, match="hidden_size.*language_projection_dim.*fill="):
        QVLConfig.from_yaml(file)
    with pytest.raises(ValueError, match="unknown preset 'qvl-3b'"):
        QVLConfig.from_yaml(file, fill="qvl-3b")


def test_yaml_has_the_keys_of_the_specification_in_its_groups():
    text = QVLConfig.from_preset("qvl-2b").to_yaml()
    values = yaml.safe_load(text)
    assert values["model_type"] == "qwen3_vl"
    assert {key: values[key] for key in FIXED} == FIXED and isinstance(values["layer_norm_eps"], float)
    order = [line.split(":")[0] for line in text.splitlines() if not line.startswith("#") and line]
    assert [key for key in order if key in SPEC_KEYS] == SPEC_KEYS
    heads = [line[2:] for line in text.splitlines() if line.startswith("# ") and "Configuration" in line]
    assert heads == list(GROUPS)


@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden_dropout_prob": 0.25, "layer_norm_eps": 1e-6, "cross_attention_layers": [2]}, {"bos_token_id": 3}],
)
def test_yaml_round_trip(tmp_path, changes):
    config = tiny(**changes)
    config.to_yaml(tmp_path / "model.yaml")
    assert QVLConfig.from_yaml(tmp_path / "model.yaml").to_dict() == config.to_dict()


def test_yaml_in_nested_groups_and_documents(tmp_path):
    file = tmp_path / "model.yaml"
    file.write_text(
        "transformer:\n  hidden_size: 384\n  num_hidden_layers: 2\n  layer_norm_eps: 1e-5\n---\nmultimodal:\n  "
        "cross_attention_layers: [1]\n"
    )
    config = QVLConfig.from_yaml(file, fill="qvl-tiny")
    assert (config.hidden_size, config.num_hidden_layers, config.layer_norm_eps, config.cross_attention_layers) == (
        384,
        2,
        1e-5,
        [1],
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("hidden_sizes: 3", "unknown keys hidden_sizes"),
        ("a: {hidden_size: 192}\nb: {hidden_size: 384}", "hidden_size is 192 and 384"),
        ("hidden_size: 192\n---\nhidden_size: 192", "hidden_size is 192 and 192; keep one"),
        ("hidden_size: 192\nnum_hidden_layers: 2\nhidden_size: 384", "'hidden_size' is given twice"),
        ("a: {hidden_size: 192, hidden_size: 192}", "'hidden_size' is given twice"),
        ("? [hidden_size]\n: 3", "cannot be a key"),
        ("model_type: bert", "model_type must be qwen3_vl"),
        ("- 1\n- 2", "keys and values"),
        ("a: [", "not YAML"),
    ],
)
def test_yaml_refusals(tmp_path, text, message):
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        QVLConfig.from_yaml(tmp_path / "model.yaml", fill="qvl-tiny")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_size=190), "hidden_size must be a multiple of 2 x num_attention_heads.*190 and 6"),
        (dict(hidden_size=30, language_projection_dim=30), "hidden_size must be a multiple of 2 x"),
        (dict(num_key_value_heads=4), "num_attention_heads must be a multiple of num_key_value_heads"),
        (dict(vision_hidden_size=130), "vision_hidden_size must be a multiple of 4 x"),
        (dict(vision_image_size=97), "vision_image_size must be a multiple of vision_patch_size"),
        (dict(language_projection_dim=100), "language_projection_dim must be a multiple"),
        (dict(num_query_tokens=4), "connector_type mlp keeps every"),
        (dict(connector_type="attention"), "connector_type attention reads"),
        (
            dict(connector_type="attention", num_query_tokens=4, vision_projection_dim=98),
            "heads of the attention connector",
        ),
        (dict(connector_type="linear"), "connector_type must be attention or mlp"),
        (dict(multimodal_fusion_type="concat"), "multimodal_fusion_type must be cross_attention"),
        (dict(vision_model_type="resnet"), "vision_model_type must be vit"),
        (dict(cross_attention_layers=[]), "cross_attention_layers must name"),
        (dict(cross_attention_layers=[4]), "layers 0 to 3"),
        (dict(cross_attention_layers=[2, 1]), "in order"),
        (dict(hidden_act="swoosh"), "'swoosh' is not an activation"),
        (dict(hidden_dropout_prob=1.0), r"hidden_dropout_prob must be in \[0, 1\)"),
        (dict(attention_probs_dropout_prob=-0.1), r"attention_probs_dropout_prob must be in"),
        (dict(layer_norm_eps=0.0), "layer_norm_eps must be positive"),
        (dict(rope_theta=float("nan")), "rope_theta must be positive"),
        (dict(rope_theta=10**400), "rope_theta must be positive and at most 1e30"),
        (dict(cross_attention_gate_init=float("nan")), "cross_attention_gate_init must be a finite number"),
        (dict(rms_norm_eps=0.5, layer_norm_eps=0.1), "rms_norm_eps and layer_norm_eps are one setting"),
        (dict(type_vocab_size=1), "type_vocab_size must be at least 2"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be at least 1"),
        (dict(image_token_id=384), "image_token_id 384 is not in the vocabulary of 384"),
        (dict(eos_token_id=[2, 900]), "eos_token_id"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(hidden_size="wide"),
        dict(hidden_size=192.0),
        dict(num_hidden_layers=True),
        dict(num_hidden_layers=None),
        dict(hidden_dropout_prob="0.1"),
        dict(tie_word_embeddings=1),
        dict(cross_attention_layers=[1.0]),
        dict(eos_token_id="2"),
        dict(hidden_act=3),
    ],
    ids=str,
)
def test_wrong_types_are_refused(changes):
    """Raises TypeError, as documented, instead of huggingface_hub's own exception."""
    ((key, value),) = changes.items()
    with pytest.raises(TypeError, match=f"QVLConfig: .*{key}"):
        tiny(**changes)
    config = tiny()
    with pytest.raises(TypeError, match=f"QVLConfig: .*{key}"):
        setattr(config, key, value)
    assert getattr(config, key) == getattr(tiny(), key)


@pytest.mark.parametrize(("alias", "key"), QVLConfig.attribute_map.items())
def test_wrong_types_under_another_name(alias, key):
    with pytest.raises(TypeError, match=f"QVLConfig: .*{key}"):
        tiny(**{alias: "1e-6"})
    config = tiny(**{alias: 0.25})
    with pytest.raises(TypeError, match=f"QVLConfig: .*{key}"):
        setattr(config, alias, "1e-6")
    assert getattr(config, key) == getattr(config, alias) == 0.25


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("hidden_sizes", "hidden_size"),
        ("num_layers_hidden", None),
        ("hidden_dropout", "hidden_dropout_prob"),
        ("tie_words_embeddings", "tie_word_embeddings"),
        ("num_query_token", "num_query_tokens"),
        ("cross_attention_layer", "cross_attention_layers"),
        ("text_config", None),
        ("rope_scaling", None),
    ],
)
def test_unknown_keys_are_refused(key, nearest, tmp_path):
    """None of these may be ignored silently."""
    hint = f"did you mean {nearest}" if nearest else "known are num_hidden_layers, "
    for make in (QVLConfig, tiny):
        with pytest.raises(ValueError, match=f"unknown key {key}; {hint}"):
            make(**{key: 3})
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: 3}))
    if nearest:
        for load in (QVLConfig.from_pretrained, AutoConfig.from_pretrained):
            with pytest.raises(ValueError, match=f"unknown key {key}; {hint}"):
                load(tmp_path)
        with pytest.raises(ValueError, match=f"unknown key {key}; {hint}"):
            QVLConfig.from_json_file(file)
        tiny().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"unknown key {key}; {hint}"):
            QVLConfig.from_pretrained(tmp_path, **{key: 3})


@pytest.mark.parametrize("key", ["head_dim", "text_config", "vision_config"])
def test_settings_of_other_models_are_refused(key, tmp_path):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: {"hidden_size": 3}}))
    with pytest.raises(ValueError, match=f"{key} is no setting of QVL"):
        QVLConfig.from_pretrained(tmp_path)


def test_what_config_files_hold_loads(tmp_path, caplog):
    """Keys that any version of transformers writes load silently; a user's own key loads with a warning."""
    transformers.utils.logging.enable_propagation()
    stored = {
        "_name_or_path": "x",
        "architectures": ["QVLForConditionalGeneration"],
        "torch_dtype": "bfloat16",
        "transformers_version": "5.99.0",
        "id2label": {"0": "a"},
        "label2id": {"a": 0},
        "_commit_hash": None,
        "attn_implementation": "eager",
        "problem_type": None,
        "auto_map": {},
        "max_length": 20,
        "num_beams": 1,
        "output_attentions": False,
        "use_cache": False,
        "is_encoder_decoder": False,
        "rms_norm_eps": 1e-5,
    }
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, **stored}))
    try:
        for loaded in (QVLConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
            assert loaded.dtype == torch.bfloat16 and loaded.use_cache is False and loaded.layer_norm_eps == 1e-5
        assert not [record for record in caplog.records if "none of its keys" in record.message]
        file.write_text(json.dumps({**written, "who_trained_it": "we"}))
        config = QVLConfig.from_pretrained(tmp_path)
        assert any("who_trained_it is none of its keys" in record.message for record in caplog.records)
    finally:
        transformers.utils.logging.disable_propagation()
    assert config.who_trained_it == "we" and config.hidden_size == tiny().hidden_size
    config.save_pretrained(tmp_path)
    assert QVLConfig.from_pretrained(tmp_path, hidden_dropout_prob=0.3).hidden_dropout_prob == 0.3
    assert (
        type(tiny()).from_dict(config.to_dict()).who_trained_it == "we" and copy.deepcopy(config).who_trained_it == "we"
    )
    assert QVLConfig(**tiny().to_dict()).to_dict() == tiny().to_dict()


def test_a_config_edited_into_nonsense_builds_no_model():
    config = tiny()
    config.num_key_value_heads = 4
    with pytest.raises(ValueError, match="num_key_value_heads"):
        QVLModel(config)


def test_unknown_preset():
    with pytest.raises(ValueError, match="unknown preset 'qvl-7b'; known are qvl-2b, qvl-tiny"):
        QVLConfig.from_preset("qvl-7b")


def test_default_cross_attention_layers():
    assert QVLConfig(num_hidden_layers=9).cross_attention_layers == [3, 7]
    assert QVLConfig(num_hidden_layers=2).cross_attention_layers == [1]


def test_json_and_auto_classes(tmp_path):
    config = tiny(hidden_dropout_prob=0.2, cross_attention_layers=[0, 3])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qvl"
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is QVLConfig and loaded.cross_attention_layers == [0, 3] and loaded.hidden_dropout_prob == 0.2
    with torch.device("meta"):
        assert type(AutoModel.from_config(loaded)) is QVLModel
        assert type(AutoModelForImageTextToText.from_config(loaded)) is QVLForConditionalGeneration
