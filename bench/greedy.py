"""Greedy tokens of stock and accelerated fp32 models on small configs of awkward shapes."""

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONFIGS", "QVL_CONFIGS", "compare", "qvl_models", "qwen3_vl_models", "run", "tiny_config"]

TOKENS = 64
MARGIN = 10.0  # tokens may differ only where the two best logits are closer than this many times the error

# text: layers, hidden, MLP, heads, key/value heads, head_dim, M-RoPE sections; vision: depth, hidden, MLP, heads; image
# grid
CONFIGS = [
    ((5, 96, 200, 6, 3, 24, (4, 4, 4)), (4, 48, 100, 3), (1, 2, 2)),
    ((5, 144, 250, 6, 3, 24, (4, 4, 4)), (4, 48, 100, 3), (1, 34, 18)),
    ((2, 40, 72, 5, 5, 8, (2, 1, 1)), (3, 24, 50, 2), (1, 4, 6)),
    ((3, 64, 129, 8, 1, 16, (4, 2, 2)), (3, 40, 81, 5), (1, 6, 10)),
    ((4, 120, 320, 3, 1, 40, (8, 6, 6)), (3, 72, 96, 1), (1, 10, 2)),
    ((1, 72, 144, 9, 3, 8, (2, 1, 1)), (3, 16, 33, 4), (2, 4, 4)),
    ((3, 130, 257, 2, 2, 72, (12, 12, 12)), (5, 60, 120, 3), (1, 8, 8)),
    ((2, 256, 384, 4, 2, 128, (24, 20, 20)), (4, 64, 128, 1), (1, 16, 14)),
]
# text: layers, hidden, MLP, heads, key/value heads, cross-attention layers, width of their queries; vision: layers,
# hidden, MLP, heads, width of visual tokens; query tokens (0: MLP connector); pixels of the image, patches of 4
QVL_CONFIGS = [
    ((4, 72, 50, 6, 3, [1, 3], 96), (3, 36, 44, 3, 28), 0, (14, 19)),
    ((3, 40, 66, 4, 4, [0, 2], 36), (2, 24, 30, 2, 20), 5, (8, 33)),
    ((5, 96, 200, 6, 1, [0, 1, 2, 3, 4], 96), (4, 48, 100, 3, 33), 17, (40, 4)),
    ((2, 130, 257, 5, 5, [1], 35), (3, 64, 81, 4, 64), 1, (64, 64)),
    ((3, 256, 384, 2, 1, [0], 256), (2, 128, 250, 1, 96), 0, (28, 60)),
]
VOCABULARY = 331
IMAGE, VIDEO, VISION_START, VISION_END = 1, 2, 3, 4


def tiny_config(text: tuple, vision: tuple) -> dict:
    """Keyword arguments of Qwen3VLConfig for one row of CONFIGS."""
    layers, hidden, mlp, heads, kv_heads, head_dim, sections = text
    depth, vision_hidden, vision_mlp, vision_heads = vision
    return {
        "tie_word_embeddings": True,
        "text_config": {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": VOCABULARY,
            "initializer_range": 0.1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": list(sections),
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": depth,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_mlp,
            "num_heads": vision_heads,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": hidden,
            "deepstack_visual_indexes": [0, depth - 1],
            "num_position_embeddings": 64,
            "initializer_range": 0.1,
        },
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }


def _prompt(grid: tuple[int, int, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    frames, height, width = grid
    patches = frames * height * width
    words = torch.randint(5, VOCABULARY, (13,), generator=generator)
    image = torch.tensor([VISION_START] + [IMAGE] * (patches // 4) + [VISION_END])
    ids = torch.cat([words[:4], image, words[4:]])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(patches, 3 * 2 * 16 * 16, generator=generator),
        "image_grid_thw": torch.tensor([grid]),
    }


def compare(
    stock: "PreTrainedModel", ours: "PreTrainedModel", prompt: dict[str, torch.Tensor], tokens: int = TOKENS
) -> tuple[int, int]:
    """(tokens that must agree, tokens of those that do).

    The comparison ends at the first difference, since later tokens depend on it. It counts as a failure if stock's
    margin between its two best logits exceeds MARGIN times the largest difference of the logits at that step.
    """
    options = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    one, other = stock.generate(**prompt, **options), ours.generate(**prompt, **options)
    length = prompt["input_ids"].shape[1]
    for step in range(tokens):
        if one.sequences[0, length + step] != other.sequences[0, length + step]:
            best = one.logits[step][0].topk(2).values
            error = (one.logits[step] - other.logits[step]).abs().max()
            wrong = bool(best[0] - best[1] > MARGIN * error)
            return step + wrong, step
    return tokens, tokens


def qwen3_vl_models() -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """A stock fp32 model with seeded random weights for each of CONFIGS, and a prompt."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    for index, (text, vision, grid) in enumerate(CONFIGS):
        torch.manual_seed(index)
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**tiny_config(text, vision))).eval()
        yield model, _prompt(grid, torch.Generator().manual_seed(index))


def qvl_models() -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """The same for QVL_CONFIGS."""
    from qvl_model.qvl import QVLConfig, QVLForConditionalGeneration

    for index, (text, vision, queries, image) in enumerate(QVL_CONFIGS):
        layers, hidden, mlp, heads, kv_heads, fused, fused_width = text
        depth, vision_hidden, vision_mlp, vision_heads, visual_width = vision
        torch.manual_seed(index)
        model = QVLForConditionalGeneration(
            QVLConfig(
                num_hidden_layers=layers,
                hidden_size=hidden,
                intermediate_size=mlp,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                cross_attention_layers=fused,
                language_projection_dim=fused_width,
                vision_num_hidden_layers=depth,
                vision_hidden_size=vision_hidden,
                vision_intermediate_size=vision_mlp,
                vision_num_attention_heads=vision_heads,
                vision_projection_dim=visual_width,
                connector_type="attention" if queries else "mlp",
                num_query_tokens=queries,
                vision_patch_size=4,
                vision_image_size=16,
                vocab_size=VOCABULARY,
                image_token_id=IMAGE,
                pad_token_id=0,
                eos_token_id=None,
                initializer_range=0.1,
                rope_theta=10000.0,
            )
        ).eval()
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(5, VOCABULARY, (1, 13), generator=generator)
        ids[0, 4] = IMAGE
        yield (
            model,
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(1, 3, *image, generator=generator),
            },
        )


def run(models: Iterable[tuple[nn.Module, dict[str, Tensor]]]) -> dict[str, object]:
    """Share of equal tokens over stock models and their prompts, and the counts of each."""
    import qvl_model

    counts = [compare(stock, qvl_model.accelerate(copy.deepcopy(stock)), prompt) for stock, prompt in models]
    compared = sum(count for count, _ in counts)
    return {"share": sum(equal for _, equal in counts) / compared, "compared": compared, "configs": counts}
