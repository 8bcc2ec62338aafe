"""Small QVL models with seeded random weights, and inputs for them."""

import copy

import torch
from torch import nn

import qvl_model
from qvl_model.qvl import QVLConfig, QVLForConditionalGeneration

IMAGE, VOCABULARY = 90, 96
PATCH = 4

# Sizes are odd on purpose; text ids are below IMAGE.
CONFIGS = {
    "mlp": dict(
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        hidden_size=72,
        intermediate_size=50,
        cross_attention_layers=[1, 3],
        vision_num_hidden_layers=3,
        vision_num_attention_heads=3,
        vision_hidden_size=36,
        vision_intermediate_size=44,
        connector_type="mlp",
        num_query_tokens=0,
        vision_projection_dim=28,
        language_projection_dim=96,
    ),
    "attention": dict(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        hidden_size=40,
        intermediate_size=66,
        cross_attention_layers=[0, 2],
        vision_num_hidden_layers=2,
        vision_num_attention_heads=2,
        vision_hidden_size=24,
        vision_intermediate_size=30,
        connector_type="attention",
        num_query_tokens=5,
        connector_num_layers=2,
        vision_projection_dim=20,
        language_projection_dim=36,
        attention_bias=True,
        tie_word_embeddings=False,
        hidden_act="silu",
    ),
}


def config(name: str = "mlp", **changes) -> QVLConfig:
    shared = dict(
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        rope_theta=10000.0,
        vision_patch_size=PATCH,
        vision_image_size=4 * PATCH,
        image_token_id=IMAGE,
        pad_token_id=0,
        eos_token_id=None,
        max_num_images=3,
    )
    return QVLConfig(**{**shared, **CONFIGS[name], **changes})


def plain_model(
    name: str = "mlp", dtype: torch.dtype = torch.float32, *, seed: int = 0, attention: str = "sdpa", **changes
) -> QVLForConditionalGeneration:
    """A stock QVL model in eval mode, with random weights large enough that each affects the result."""
    settings = config(name, **changes)
    settings._attn_implementation = attention
    model = QVLForConditionalGeneration(settings).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("gate"):
                parameter.copy_(0.8 + 0.2 * noise)
            elif "embed" in key or "queries" in key:
                parameter.copy_(noise if "patch_embed" not in key else noise / max(1, parameter[0].numel()) ** 0.5)
            elif parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise if key.endswith("bias") else 1 + 0.2 * noise)
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


def pair(name: str = "mlp", dtype: torch.dtype = torch.float32, **options) -> tuple[nn.Module, nn.Module]:
    """(plain, accelerated) with the same weights."""
    plain = plain_model(name, dtype, **options)
    return plain, qvl_model.accelerate(copy.deepcopy(plain))


def inputs(
    *lengths: int, image: tuple[int, int] | None = (14, 19), padding: str = "left", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Rows of these numbers of tokens, padded to one length; each with an image of ``image`` pixels."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids, mask = (
        torch.zeros(len(lengths), longest, dtype=torch.long),
        torch.zeros(len(lengths), longest, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        place = slice(longest - length, None) if padding == "left" else slice(length)
        tokens = torch.randint(1, IMAGE, (length,), generator=generator)
        if image is not None:
            tokens[min(1, length - 1)] = IMAGE
        ids[row, place], mask[row, place] = tokens, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if image is not None:
        batch["pixel_values"] = torch.randn(len(lengths), 3, *image, generator=generator)
    return batch


def pad_pixels(*images: torch.Tensor, filler: float = float("nan")) -> dict[str, torch.Tensor]:
    """Images [C, h, w] of any sizes as one batch, padded with ``filler``."""
    height, width = max(p.shape[1] for p in images), max(p.shape[2] for p in images)
    pixels = torch.full((len(images), images[0].shape[0], height, width), filler)
    mask = torch.zeros(len(images), height, width, dtype=torch.long)
    for i, image in enumerate(images):
        pixels[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}
