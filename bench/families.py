"""What differs between model families in the benchmark."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from bench import greedy
from bench.checkpoint_files import FULL_CONFIG, IMAGE_PROCESSOR, special_token_ids, write_json
from bench.roofline import Work, matmul
from bench.targets import NOTES, PEER_NOTES, PEER_TARGETS, QUANTIZED_TARGETS, QVL_NOTES, QVL_TARGETS, TARGETS, Target

__all__ = ["FAMILIES", "Family", "family_of"]


def _bytes(*modules: nn.Module) -> int:
    """Bytes of parameters and of the buffers that hold quantised weights."""
    return sum(x.numel() * x.element_size() for module in modules for x in (*module.parameters(), *module.buffers()))


def _vision_layers(layers: int, width: int, mlp: int, patches: int, images: int) -> Work:
    """Patches of an image attend to all of that image."""
    return matmul(patches, layers * 2 * width * (2 * width + mlp)) + Work(
        attention=layers * 4 * width * patches**2 / images
    )


def _decoder(config: Any, tokens: int, predicted: int, pairs: float, keys: float) -> Work:
    """Decoder layers over ``tokens`` and the head over ``predicted`` of them; ``pairs`` of a query and a key that it
    sees, and ``keys`` in the KV cache.
    """
    layers, hidden, dim = config.num_hidden_layers, config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return (
        matmul(tokens, layers * hidden * (2 * dim * (heads + kv_heads) + 3 * config.intermediate_size))
        + matmul(predicted, config.vocab_size * hidden)
        + Work(attention=layers * 4 * heads * dim * pairs, cache=layers * 2 * kv_heads * dim * keys)
    )


def _visual_keys(config: Any) -> int:
    """Elements of a visual token's keys in one layer of cross-attention."""
    return config.num_key_value_heads * (config.language_projection_dim // config.num_attention_heads)


def _fusion(config: Any, tokens: int, visual: int) -> Work:
    """Cross-attention of ``tokens`` to visual tokens whose keys and values are in the cache; none without any."""
    if not visual:
        return Work()
    layers, width = len(config.cross_attention_layers), config.language_projection_dim
    return matmul(tokens, layers * 2 * config.hidden_size * width) + Work(
        attention=layers * 4 * width * tokens * visual, cache=layers * 2 * _visual_keys(config) * visual
    )


class Family(Protocol):
    """Of the full-size checkpoint, of its inputs, and of what one decoded token reads.

    Attributes:
        name: of --family, and model_type in config.json with an underscore.
        title, architecture: for people.
        shipped: the trained model that the accuracy suite runs on.
        targets: what the benchmark must show. notes: what it shows besides.
    """

    name: str
    title: str
    architecture: str
    shipped: str
    targets: list[Target]
    notes: list[Target]

    def full_config(self) -> dict:
        """Keyword arguments of ``config`` for the full size."""

    def config(self, **settings: Any) -> Any:
        """A transformers config with the token ids of the tokenizer that is written beside the weights."""

    def write_image_processor(self, directory: Path) -> None:
        """Writes preprocessor_config.json beside config.json."""

    def image_size(self, model: nn.Module, prompt: dict[str, Tensor]) -> tuple[int, int]:
        """(patches, visual tokens) of the images of a prompt."""

    def encode(self, model: nn.Module, prompt: dict[str, Tensor]) -> object:
        """The vision encoder: pixels to visual tokens."""

    def bytes_per_token(self, model: nn.Module, prompt: dict[str, Tensor]) -> int:
        """Bytes that one decode step reads: weights of decoder and head, once, and the prompt's KV cache."""

    def vision_work(self, config: Any, patches: int, images: int) -> Work:
        """What ``encode`` takes for images of the same size with so many patches together."""

    def prompt_work(self, config: Any, tokens: int, visual: int) -> Work:
        """What a prompt of one row takes in the decoder, and the head at its end. ``visual``: its visual tokens."""

    def step_work(self, config: Any, rows: int, keys: float, visual: int) -> Work:
        """What a decode step of ``rows`` takes that reads so many keys of the KV cache in all."""

    def shallow(self, config: Any, layers: int) -> None:
        """Cuts a config down to so many layers of text and of vision."""

    def greedy(self) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
        """Small fp32 models of awkward shapes and prompts for them."""


class Qwen3VL(Family):
    name, title, architecture = (
        "qwen3-vl",
        "Qwen3-VL: stock transformers (sdpa, bf16) and accelerated",
        "Qwen3-VL-2B architecture",
    )
    shipped, targets, notes = "digits", [*TARGETS, *QUANTIZED_TARGETS, *PEER_TARGETS], [*NOTES, *PEER_NOTES]

    def full_config(self) -> dict:
        return FULL_CONFIG

    def config(self, **settings: Any) -> Any:
        from transformers import Qwen3VLConfig

        return Qwen3VLConfig(**settings, **special_token_ids())

    def write_image_processor(self, directory: Path) -> None:
        write_json(directory / "preprocessor_config.json", IMAGE_PROCESSOR)

    def image_size(self, model: nn.Module, prompt: dict[str, Tensor]) -> tuple[int, int]:
        return prompt["pixel_values"].shape[0], int((prompt["input_ids"] == model.config.image_token_id).sum())

    def encode(self, model: nn.Module, prompt: dict[str, Tensor]) -> object:
        return model.model.visual(prompt["pixel_values"].to(model.dtype), grid_thw=prompt["image_grid_thw"])

    def bytes_per_token(self, model: nn.Module, prompt: dict[str, Tensor]) -> int:
        text, config = model.model.language_model, model.config.text_config
        cache = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * prompt["input_ids"].shape[1]
        return _bytes(text.layers, text.norm, model.lm_head) + 2 * cache * model.dtype.itemsize

    def vision_work(self, config: Any, patches: int, images: int) -> Work:
        vision = config.vision_config
        width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
        return (
            matmul(patches, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width)
            + _vision_layers(vision.depth, width, vision.intermediate_size, patches, images)
            + matmul(
                patches / vision.spatial_merge_size**2,
                (1 + len(vision.deepstack_visual_indexes)) * merged * (merged + vision.out_hidden_size),
            )
        )

    def prompt_work(self, config: Any, tokens: int, visual: int) -> Work:
        return _decoder(config.text_config, tokens, 1, tokens * (tokens + 1) / 2, tokens)

    def step_work(self, config: Any, rows: int, keys: float, visual: int) -> Work:
        return _decoder(config.text_config, rows, rows, keys, keys)

    def shallow(self, config: Any, layers: int) -> None:
        text, vision = config.text_config, config.vision_config
        text.num_hidden_layers = min(layers, text.num_hidden_layers)
        vision.depth = min(layers, vision.depth)
        taps = len(vision.deepstack_visual_indexes)
        vision.deepstack_visual_indexes = list(range(vision.depth - taps, vision.depth))

    def greedy(self) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
        return greedy.qwen3_vl_models()


class QVL(Family):
    name, title, architecture = "qvl", "QVL: plain PyTorch modules (sdpa, bf16) and accelerated", "qvl-2b preset"
    shipped, targets, notes = "qvl-tiny", QVL_TARGETS, QVL_NOTES

    def full_config(self) -> dict:
        import yaml

        from qvl_model.qvl import QVLConfig

        settings = yaml.safe_load(QVLConfig.from_preset("qvl-2b").to_yaml())
        return {key: value for key, value in settings.items() if key not in ("model_type", "image_token_id")}

    def config(self, **settings: Any) -> Any:
        from qvl_model.qvl import QVLConfig

        return QVLConfig(**settings, image_token_id=special_token_ids()["image_token_id"])

    def write_image_processor(self, directory: Path) -> None:
        from qvl_model.qvl import QVLConfig
        from qvl_model.qvl.processing import QVLImageProcessor

        QVLImageProcessor(
            QVLConfig.from_pretrained(directory, trust_remote_code=False).vision_patch_size
        ).save_pretrained(directory)

    def image_size(self, model: nn.Module, prompt: dict[str, Tensor]) -> tuple[int, int]:
        config, (height, width) = model.config, prompt["pixel_values"].shape[-2:]
        images = int((prompt["input_ids"] == config.image_token_id).sum())
        patches = images * (height // config.vision_patch_size) * (width // config.vision_patch_size)
        return patches, images * config.num_query_tokens or patches

    def encode(self, model: nn.Module, prompt: dict[str, Tensor]) -> object:
        return model.get_image_features(prompt["pixel_values"], prompt["pixel_attention_mask"])

    def bytes_per_token(self, model: nn.Module, prompt: dict[str, Tensor]) -> int:
        text, config = model.model.language_model, model.config
        once = [
            proj
            for layer in text.layers
            if layer.fusion is not None
            for proj in (layer.fusion.attn.k_proj, layer.fusion.attn.v_proj)
        ]
        keys = config.num_hidden_layers * config.head_dim * prompt["input_ids"].shape[1]
        visual_dim = config.language_projection_dim // config.num_attention_heads
        keys += len(config.cross_attention_layers) * visual_dim * self.image_size(model, prompt)[1]
        return (
            _bytes(text.layers, text.norm, model.lm_head)
            - _bytes(*once)
            + 2 * config.num_key_value_heads * keys * model.dtype.itemsize
        )

    def vision_work(self, config: Any, patches: int, images: int) -> Work:
        width, out, mlp = config.vision_hidden_size, config.vision_projection_dim, config.vision_intermediate_size
        work = matmul(patches, config.vision_num_channels * config.vision_patch_size**2 * width)
        work += _vision_layers(config.vision_num_hidden_layers, width, mlp, patches, images)
        if config.connector_type == "mlp":
            return work + matmul(patches, mlp * (width + out))
        layers, queries = config.connector_num_layers, images * config.num_query_tokens
        return (
            work
            + matmul(queries, layers * 2 * out * (out + mlp))
            + matmul(patches, layers * 2 * width * out)
            + Work(attention=layers * 4 * out * config.num_query_tokens * patches)
        )

    def prompt_work(self, config: Any, tokens: int, visual: int) -> Work:
        keys = len(config.cross_attention_layers) * 2 * config.vision_projection_dim * _visual_keys(config)
        return (
            _decoder(config, tokens, 1, tokens * (tokens + 1) / 2, tokens)
            + _fusion(config, tokens, visual)
            + (matmul(visual, keys) if visual else Work())
        )

    def step_work(self, config: Any, rows: int, keys: float, visual: int) -> Work:
        return _decoder(config, rows, rows, keys, keys) + _fusion(config, rows, visual)

    def shallow(self, config: Any, layers: int) -> None:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
        config.vision_num_hidden_layers = min(layers, config.vision_num_hidden_layers)
        config.cross_attention_layers = [
            layer for layer in config.cross_attention_layers if layer < config.num_hidden_layers
        ]

    def greedy(self) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
        return greedy.qvl_models()


FAMILIES: dict[str, Family] = {family.name: family for family in (Qwen3VL(), QVL())}


def family_of(config: Any) -> Family:
    """The family of a model's config."""
    return FAMILIES[config.model_type.replace("_", "-")]
