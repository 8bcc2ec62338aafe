"""Tiny Qwen3-VL models with seeded random weights, inputs for them without a processor, and a count of fused calls."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import qvl_kernels
import qvl_model
from qvl_kernels import dispatch
from qvl_kernels.ops.decoder_layer import prepared

VOCABULARY = 160
IMAGE, VIDEO, VISION_START, VISION_END = 150, 151, 152, 153  # text ids are below these
PATCH, TEMPORAL, MERGE = 4, 2, 2

# The text part is what varies most; head sizes and groups are odd on purpose. sections sum to half of head_dim.
CONFIGS = {
    "odd": dict(heads=6, kv_heads=3, head_dim=24, hidden=72, mlp=100, layers=5, sections=[4, 4, 4], vision=(60, 3, 76)),
    "small": dict(
        heads=4, kv_heads=2, head_dim=16, hidden=64, mlp=96, layers=3, sections=[4, 2, 2], vision=(32, 2, 64)
    ),
    "multi_query": dict(
        heads=5, kv_heads=1, head_dim=12, hidden=40, mlp=33, layers=2, sections=[2, 2, 2], vision=(36, 3, 20)
    ),
    "multi_head": dict(
        heads=3, kv_heads=3, head_dim=20, hidden=52, mlp=47, layers=4, sections=[4, 3, 3], vision=(24, 1, 41)
    ),
    "one_head": dict(
        heads=1, kv_heads=1, head_dim=64, hidden=24, mlp=130, layers=3, sections=[24, 4, 4], vision=(16, 4, 9)
    ),
    "wide_head": dict(
        heads=4, kv_heads=2, head_dim=128, hidden=56, mlp=64, layers=2, sections=[24, 20, 20], vision=(88, 2, 50)
    ),
    "untied_bias": dict(
        heads=7,
        kv_heads=7,
        head_dim=8,
        hidden=33,
        mlp=65,
        layers=6,
        sections=[2, 1, 1],
        vision=(44, 11, 30),
        tied=False,
        bias=True,
    ),
    "one_layer": dict(
        heads=9, kv_heads=3, head_dim=40, hidden=96, mlp=31, layers=1, sections=[8, 6, 6], vision=(28, 7, 17)
    ),
}


def config(name: str = "odd") -> Qwen3VLConfig:
    c = CONFIGS[name]
    vision_hidden, vision_heads, vision_mlp = c["vision"]
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=c["hidden"],
            intermediate_size=c["mlp"],
            num_hidden_layers=c["layers"],
            num_attention_heads=c["heads"],
            num_key_value_heads=c["kv_heads"],
            head_dim=c["head_dim"],
            max_position_embeddings=4096,
            attention_bias=c.get("bias", False),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": c["sections"],
                "mrope_interleaved": True,
            },
        ),
        vision_config=dict(
            depth=c.get("depth", 4),
            hidden_size=vision_hidden,
            intermediate_size=vision_mlp,
            num_heads=vision_heads,
            in_channels=3,
            patch_size=PATCH,
            temporal_patch_size=TEMPORAL,
            spatial_merge_size=MERGE,
            out_hidden_size=c["hidden"],
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 2][: c["layers"]],
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=c.get("tied", True),
    )


def stock_model(
    name: str = "odd", dtype: torch.dtype = torch.float32, *, seed: int = 0, attention: str = "sdpa"
) -> Qwen3VLForConditionalGeneration:
    """A stock model with random weights large enough that each affects the result."""
    settings = config(name)
    settings._attn_implementation = attention
    model = Qwen3VLForConditionalGeneration(settings).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / (parameter[0].numel() ** 0.5))
            elif key.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1 + 0.2 * noise)
        model.model.language_model.embed_tokens.weight.mul_(4)  # unit-sized embeddings, as trained ones are
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # no end-of-sequence token: every sequence has its full length
    return model.to(dtype)


def pair(name: str = "odd", dtype: torch.dtype = torch.float32, **options) -> tuple[nn.Module, nn.Module]:
    """(stock, accelerated) with the same weights."""
    stock = stock_model(name, dtype, **options)
    return stock, qvl_model.accelerate(copy.deepcopy(stock))


Segment = int | tuple[int, int, int]  # number of text tokens, or the (t, h, w) patches of an image (t = 1) or video


def inputs(*rows: list[Segment], padding: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs of one or more rows of segments, padded to one length."""
    generator = torch.Generator().manual_seed(seed)
    ids, types, grids = [], [], {IMAGE: [], VIDEO: []}
    for row in rows:
        row_ids, row_types = [], []
        for segment in row:
            if isinstance(segment, int):
                row_ids += torch.randint(1, IMAGE, (segment,), generator=generator).tolist()
                row_types += [0] * segment
                continue
            frames, height, width = segment
            token, kind = (IMAGE, 1) if frames == 1 else (VIDEO, 2)
            grids[token].append(segment)
            for _ in range(frames):  # every frame of a video stands between its own markers
                count = height * width // MERGE**2
                row_ids += [VISION_START] + [token] * count + [VISION_END]
                row_types += [0] + [kind] * count + [0]
        ids.append(row_ids)
        types.append(row_types)
    length = max(map(len, ids))

    def padded(row: list[int], filler: int = 0) -> list[int]:
        gap = [filler] * (length - len(row))
        return gap + row if padding == "left" else row + gap

    batch = {
        "input_ids": torch.tensor([padded(row) for row in ids]),
        "attention_mask": torch.tensor([padded([1] * len(row)) for row in ids]),
    }
    for token, pixels, grid in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[token]:
            batch[grid] = torch.tensor(grids[token])
            patches = int(batch[grid].prod(1).sum())
            batch[pixels] = torch.randn(patches, 3 * TEMPORAL * PATCH**2, generator=generator)
            batch["mm_token_type_ids"] = torch.tensor([padded(row) for row in types], dtype=torch.int)
    return batch


@dataclass
class Calls:
    """Number of fused calls, and the number expected if every layer and block of every forward is fused."""

    fused: dict[str, int] = field(default_factory=lambda: {"decoder_layer": 0, "vision_block": 0})
    expected: dict[str, int] = field(default_factory=lambda: {"decoder_layer": 0, "vision_block": 0})


@contextlib.contextmanager
def fused_calls(model: nn.Module) -> Iterator[Calls]:
    """Counts the fused calls of ``model`` inside the block; the C++ backend is forced, so a fallback raises."""
    calls = Calls()
    places = {
        (qvl_kernels.PreparedDecoderLayer, "run"): "decoder_layer",
        (prepared, "run_to_last"): "decoder_layer",
        (qvl_kernels, "vision_block"): "vision_block",
    }
    originals = {place: getattr(*place) for place in places}

    def spy(place):
        def called(*args, **kwargs):
            calls.fused[places[place]] += len(args[0]) if places[place] == "decoder_layer" else 1
            return originals[place](*args, **kwargs)

        return called

    def put(owner, attribute, function):
        setattr(owner, attribute, staticmethod(function) if isinstance(owner, type) else function)

    def expects(name, count):
        def hook(*_):
            calls.expected[name] += count

        return hook

    text, vision = model.model.language_model, model.model.visual
    handles = [
        text.embed_tokens.register_forward_pre_hook(
            expects("decoder_layer", len(text.layers))
        ),  # once a forward, and once a step of ``generate``
        vision.register_forward_pre_hook(expects("vision_block", len(vision.blocks))),
    ]
    known = dispatch.fallbacks()
    try:
        for place in places:
            put(*place, spy(place))
        with qvl_kernels.use_backend("cpp"):
            yield calls
    finally:
        for place, original in originals.items():
            put(*place, original)
        for handle in handles:
            handle.remove()
    assert dispatch.fallbacks() == known


def assert_all_fused(calls: Calls, *, vision: bool) -> None:
    assert calls.expected["decoder_layer"] > 0 and (calls.expected["vision_block"] > 0) == vision
    assert calls.fused == calls.expected


def relative(out: torch.Tensor, golden: torch.Tensor) -> float:
    """||out - expected|| / ||expected|| in fp64."""
    return ((out.double() - golden.double()).norm() / golden.double().norm()).item()


def assert_close(out: torch.Tensor, expected: torch.Tensor, limit: float = 2e-5) -> None:
    """Relative error of an fp32 result against stock's; both are a few 1e-7 times the depth from the fp64 reference."""
    assert out.shape == expected.shape and out.dtype == expected.dtype
    error = relative(out, expected)
    assert error <= limit, f"relative error {error:.2e} > {limit:.0e}"


class Elsewhere(torch.Tensor):
    """A tensor subclass that holds its values in another tensor, as quantised and sharded weights do."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=held.device, strides=held.stride()
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def held(value):
            return value.held if isinstance(value, cls) else value

        return function(*torch.utils._pytree.tree_map(held, args), **torch.utils._pytree.tree_map(held, kwargs or {}))
