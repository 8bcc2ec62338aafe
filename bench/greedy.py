"""Greedy tokens of stock and accelerated fp32 models on small configs of awkward shapes."""

import copy

import torch

__all__ = ["CONFIGS", "compare", "run", "tiny_config"]

TOKENS = 64
MARGIN = 10.0  # tokens may differ only where the two best logits are closer than this many times the error

# text: layers, hidden, MLP, heads, key/value heads, head_dim, M-RoPE sections; vision: depth, hidden, MLP, heads; image grid
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
VOCABULARY = 331
IMAGE, VIDEO, VISION_START, VISION_END = 1, 2, 3, 4


def tiny_config(text: tuple, vision: tuple) -> dict:
    """Keyword arguments of Qwen3VLConfig for one row of CONFIGS."""
    layers, hidden, mlp, heads, kv_heads, head_dim, sections = text
    depth, vision_hidden, vision_mlp, vision_heads = vision
    return {
        "tie_word_embeddings": True,
        "text_config": {
            "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": VOCABULARY, "initializer_range": 0.1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(sections), "mrope_interleaved": True},
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": depth, "hidden_size": vision_hidden, "intermediate_size": vision_mlp, "num_heads": vision_heads,
            "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": hidden,
            "deepstack_visual_indexes": [0, depth - 1], "num_position_embeddings": 64, "initializer_range": 0.1,
        },
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
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


def compare(stock, ours, prompt: dict[str, torch.Tensor], tokens: int = TOKENS) -> tuple[int, int]:
    """(tokens that must agree, tokens of those that do).

    The first difference ends the comparison, since the texts go separate ways after it. It counts as a failure if stock's
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


def run() -> dict[str, object]:
    """Share of equal tokens over CONFIGS, and the counts of each."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    import qvl_model

    counts = []
    for index, (text, vision, grid) in enumerate(CONFIGS):
        torch.manual_seed(index)
        stock = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**tiny_config(text, vision))).eval()
        ours = qvl_model.accelerate(copy.deepcopy(stock))
        counts.append(compare(stock, ours, _prompt(grid, torch.Generator().manual_seed(index))))
    compared = sum(count for count, _ in counts)
    return {"share": sum(equal for _, equal in counts) / compared, "compared": compared, "configs": counts}
