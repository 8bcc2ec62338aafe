"""On untested versions of transformers: does a small accelerated model agree with the stock one?"""

import copy
from collections.abc import Callable, Hashable, Iterator

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from qvl_model.compat import TESTED_TRANSFORMERS
from qvl_model.quantization.modules import PackedEmbedding, PackedLinear
from qvl_model.qvl import QVLConfig, QVLForConditionalGeneration

__all__ = ["why_stock"]

# Relative difference to stock that is accepted: some ten roundings of the dtype. Quantised layers round activations to
# int8, and are compared with stock's layers that have the same rounded weights.
_LIMITS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_QUANTISED_LIMIT = 0.1
_GREEDY = {"max_new_tokens": 3, "do_sample": False}
_TOKEN = 7  # the only one that generate may choose, so that rounding cannot lead to other tokens

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


def why_stock(model: PreTrainedModel, change: Callable[[PreTrainedModel], None], options: Hashable) -> str | None:
    """Why a model must stay stock, or None. On tested versions this returns at once; on others it runs the prefill and
    three decode steps of a two-layer model of the same family, dtype and options. Random state, default dtype and grad
    mode are unchanged.

    Args:
        model: a model of either family, or a part of one.
        change: turns a stock model into an accelerated one, in place.
        options: what ``change`` depends on.
    """
    version = transformers.__version__
    if version in TESTED_TRANSFORMERS:
        return None
    device, dtype, config = next(model.parameters()).device, model.dtype, _small_config(model.config)
    key = (version, device, dtype, config._attn_implementation, config.to_json_string(use_diff=False), options)
    if key not in _known:
        try:
            _known[key] = _difference(config, device, dtype, change)
        except Exception as error:  # an unknown version may raise anything
            _known[key] = f"{type(error).__name__}: {error}".split("\n")[0]
    if _known[key] is None:
        return None
    return (
        f"on transformers {version}, which is not among those tested ({', '.join(TESTED_TRANSFORMERS)}), a small "
        f"accelerated model does not "
        f"give what the stock one gives: {_known[key]}. Install one of those, or a newer qvl"
    )


def _difference(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, change: Callable[[PreTrainedModel], None]
) -> str | None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
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
            change(ours)
            quantised = _copy_rounded_weights(ours, stock)
            limit = _QUANTISED_LIMIT if quantised else _LIMITS[dtype]
            for (name, expected), (_, got) in zip(_answers(stock), _answers(ours), strict=True):
                error = float((got.double() - expected.double()).norm() / expected.double().norm())
                if not error <= limit:
                    return f"{name} differ by {error:.1e} of their size (limit {limit:.0e})"
            if not quantised and dtype is torch.float32 and not torch.equal(_tokens(stock), _tokens(ours)):
                return "tokens differ"
    finally:
        torch.set_default_dtype(default)
    return None


def _copy_rounded_weights(ours: nn.Module, stock: nn.Module) -> bool:
    """Gives stock's layers the weights of our quantised ones; whether there are any."""
    quantised = [(n, m) for n, m in ours.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)]
    for name, module in quantised:
        weight = stock.get_submodule(name).weight
        weight.copy_(module.dequantize(weight.dtype))
    return bool(quantised)


def _small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a whole model with two layers, for that of a whole model or of a part."""
    config = copy.deepcopy(config)
    if not isinstance(config, QVLConfig | Qwen3VLConfig):
        part = "vision_config" if "vision" in config.model_type else "text_config"
        implementation, config = config._attn_implementation, Qwen3VLConfig(**{part: config.to_dict()})
        config._attn_implementation = implementation
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name, value in _SIZES.items():
            if name in vars(part):
                setattr(part, name, copy.copy(value))
    return config


def _small_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights."""
    model = (QVLForConditionalGeneration if isinstance(config, QVLConfig) else Qwen3VLForConditionalGeneration)(
        config
    ).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1 + 0.2 * noise)
    return model


def _answers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(what it is, its values) of a prompt with an image and of three tokens after it."""
    inputs = _inputs(model.config, next(model.parameters()))
    yield "logits of a prompt", model(**inputs).logits
    others = [token for token in range(_SIZES["vocab_size"]) if token != _TOKEN]
    options = dict(_GREEDY, suppress_tokens=others, output_logits=True, return_dict_in_generate=True)
    yield "logits of tokens", torch.stack(model.generate(**inputs, **options).logits)


def _tokens(model: nn.Module) -> Tensor:
    return model.generate(**_inputs(model.config, next(model.parameters())), **_GREEDY)


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
