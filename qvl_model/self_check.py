"""On untested versions of transformers: does a small accelerated model agree with the stock one?"""

import copy
from collections.abc import Callable, Iterator

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from qvl_model.compat import TESTED_TRANSFORMERS
from qvl_model.qvl import QVLConfig, QVLForConditionalGeneration

__all__ = ["why_stock"]

# relative difference of fp32 results, as in the tests; each is off the exact result by a few 1e-7 times the depth
_LIMIT = 2e-5

# Sizes of the small model, under the names that both families use. All else, head_dim included, is as in the model at
# hand.
_IMAGE, _START, _END = 90, 92, 93
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
    "image_token_id": _IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": _START,
    "vision_end_token_id": _END,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "cross_attention_layers": [1],
    "vision_num_hidden_layers": 2,
    "vision_num_attention_heads": 2,
    "vision_hidden_size": 64,
    "vision_intermediate_size": 96,
    "vision_projection_dim": 48,
    "language_projection_dim": 64,
    "connector_num_layers": 1,
}

_known: dict[tuple, str | None] = {}  # results of this process


def why_stock(model: nn.Module, replace: Callable[[nn.Module], None]) -> str | None:
    """Why a model must stay stock, or None. On tested versions this returns at once; on others it runs the prefill and
    three decode steps of a two-layer model of the same family and options. Random state, default dtype and grad mode
    are unchanged.

    Args:
        model: a stock model of either family, or a part of one.
        replace: turns a stock model into an accelerated one, in place.
    """
    version = transformers.__version__
    if version in TESTED_TRANSFORMERS:
        return None
    device, config = next(model.parameters()).device, model.config
    key = (version, device, config.model_type, config._attn_implementation)
    if key not in _known:
        try:
            _known[key] = _difference(config, device, replace)
        except Exception as error:  # an unknown version may raise anything
            _known[key] = f"{type(error).__name__}: {error}".split("\n")[0]
    if _known[key] is None:
        return None
    return (
        f"on transformers {version}, which is not among those tested ({', '.join(TESTED_TRANSFORMERS)}), a small "
        f"accelerated model does not "
        f"give what the stock one gives: {_known[key]}. Install one of those, or a newer qvl"
    )


def _difference(config: PreTrainedConfig, device: torch.device, replace: Callable[[nn.Module], None]) -> str | None:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.device(device),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(0)
            stock = _small_model(config)
            ours = copy.deepcopy(stock)
            replace(ours)
            for (name, expected), (_, got) in zip(_answers(stock), _answers(ours), strict=True):
                error = float((got.double() - expected.double()).norm() / expected.double().norm())
                if not error <= _LIMIT:
                    return f"{name} differ by {error:.1e} of their size (limit {_LIMIT:.0e})"
    finally:
        torch.set_default_dtype(dtype)
    return None


def _small_model(config: PreTrainedConfig) -> nn.Module:
    """A whole model with two layers and random weights, for the config of a whole model or of a part."""
    config = copy.deepcopy(config)
    if not isinstance(config, QVLConfig | Qwen3VLConfig):
        part = "vision_config" if "vision" in config.model_type else "text_config"
        implementation, config = config._attn_implementation, Qwen3VLConfig(**{part: config.to_dict()})
        config._attn_implementation = implementation
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name, value in _SIZES.items():
            if name in vars(part):
                setattr(part, name, copy.copy(value))
    model = (QVLForConditionalGeneration if isinstance(config, QVLConfig) else Qwen3VLForConditionalGeneration)(
        config
    ).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1 + 0.2 * noise)
    return model


def _answers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(what it is, its values) of a prompt with an image and of three tokens after it."""
    inputs, options = _inputs(model.config, next(model.parameters())), {"max_new_tokens": 3, "do_sample": False}
    yield "logits of a prompt", model(**inputs).logits
    yield (
        "logits of tokens",
        torch.stack(model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True).logits),
    )
    yield "tokens", model.generate(**inputs, **options)


def _inputs(config: PreTrainedConfig, like: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator(like.device).manual_seed(1)
    if isinstance(config, QVLConfig):
        shape, extra = (1, config.vision_num_channels, 2 * config.vision_patch_size, 2 * config.vision_patch_size), {}
        ids = torch.tensor([[3, _IMAGE, 4, 1, 5, 9, 2]])
    else:
        vision = config.vision_config
        side = 2 * vision.spatial_merge_size
        shape = (side * side, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
        ids = torch.tensor([[3, _START, _IMAGE, _IMAGE, _IMAGE, _IMAGE, _END, 6, 5]])
        extra = {"mm_token_type_ids": (ids == _IMAGE).int(), "image_grid_thw": torch.tensor([[1, side, side]])}
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(shape, generator=generator, dtype=torch.float32).to(like.dtype),
        **extra,
    }
