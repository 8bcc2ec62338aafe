"""What differs between model families in the benchmark."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from bench import greedy
from bench.checkpoint_files import FULL_CONFIG, IMAGE_PROCESSOR, special_token_ids, write_json
from bench.targets import NOTES, PEER_NOTES, PEER_TARGETS, QUANTIZED_TARGETS, QVL_NOTES, QVL_TARGETS, TARGETS, Target

__all__ = ["FAMILIES", "Family", "family_of"]


def _bytes(*modules: nn.Module) -> int:
    """Bytes of parameters and of the buffers that hold quantised weights."""
    return sum(x.numel() * x.element_size() for module in modules for x in (*module.parameters(), *module.buffers()))


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
