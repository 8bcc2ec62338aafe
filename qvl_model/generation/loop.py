"""Greedy and sampling: prefill by the model's forward, then one decode step per token, on the CPU or as a CUDA graph.

``generate`` is transformers' own: it prepares the inputs and calls ``_sample``. Whether a decode step computes what the
model's modules compute is decided once per call. All else (beams, assisted decoding, other caches, hooks, ...) runs on
stock code.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor
from transformers.generation.streamers import BaseStreamer
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock
from transformers.utils import output_capturing

from qvl_model.compat import CACHE
from qvl_model.generation import step_cpu, step_gpu
from qvl_model.generation.inputs import cache_indices
from qvl_model.generation.kv_cache import updates_as_stock
from qvl_model.generation.sampling import Chooser
from qvl_model.generation.sampling_gpu import Sampler
from qvl_model.generation.step_cpu import CpuStep
from qvl_model.generation.step_gpu import GpuStep, StepFailed
from qvl_model.modules import lm_head
from qvl_model.modules.fast_path import is_eligible, no_global_hooks, own, runs_library_code, stock_is_patched
from qvl_model.qvl import modeling as qvl
from qvl_model.qvl.cache import VisualLayer

__all__ = ["model_why_not", "sample", "why_not"]

# Methods of the model that transformers' own loop calls for every token, and ours does not.
_OF_THE_LOOP = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prefill",
    "_has_unfinished_sequences",
    "_optimize_model_for_decode",
)
_SAMPLE = own(GenerationMixin._sample)
# Methods of streamers, processors and criteria that are called for every token.
_OF_A_TOKEN = ("__call__", "put", "end", "on_finalized_text")
# Packages whose objects, held by a streamer, processor or criterion, run no code of the user's.
_PASSIVE = (
    "_queue",
    "_thread",
    "asyncio",
    "builtins",
    "collections",
    "numpy",
    "queue",
    "threading",
    "tokenizers",
    "torch",
)
# Arguments of the model that matter for the prefill only, or that decode steps honour.
_ARGUMENTS = {
    CACHE,
    "attention_mask",
    "position_ids",
    "use_cache",
    "logits_to_keep",
    "inputs_embeds",
    "pixel_values",
    "pixel_values_videos",
    "image_grid_thw",
    "video_grid_thw",
    "mm_token_type_ids",
    "mm_encoder_outputs",
    "pixel_attention_mask",
    "skip_logits",
    "second_per_grid_ts",
}
_CACHE_LAYERS = {DynamicCache: (DynamicLayer, VisualLayer), StaticCache: (StaticLayer, VisualLayer)}


def why_not(model: nn.Module, input_ids: Tensor, config: GenerationConfig, options: dict) -> str | None:
    """Why this call of ``_sample`` stays with stock code, or None. ``options``: its keyword arguments, the model's
    among them.
    """
    if (
        options.get("synced_gpus")
        or torch.is_grad_enabled()
        or input_ids.numel() == 0
        and options.get("inputs_embeds") is None
    ):
        return "several GPUs step together, gradients are on, or there is no prompt"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states were asked for"
    other = [
        name
        for name, value in options.items()
        if value is not None and name not in _ARGUMENTS | {"synced_gpus", "streamer"}
    ]
    if other:
        return f"the argument {other[0]}"
    cache, mask = options.get(CACHE), options.get("attention_mask")
    reason = _cache_why_not(cache) if options.get("use_cache") else "there is no cache"
    if reason is not None:
        return reason
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return "the attention mask is not [B, L]"
    if model._valid_auto_compile_criteria(options, config):
        return "transformers compiles the model"
    reason = model_why_not(model)
    if reason is not None or not _on_gpu(model):
        return reason
    if type(cache) is not DynamicCache:
        return f"the cache is a {type(cache).__name__}, which no graph writes to"
    return None


def _cache_why_not(cache: Cache | None) -> str | None:
    """Why decode steps cannot continue from this cache, as it is now, or None."""
    kinds = _CACHE_LAYERS.get(type(cache))
    if kinds is None:
        return f"the cache is a {type(cache).__name__}"
    if getattr(cache, "offloading", False) or any(type(layer) not in kinds for layer in cache.layers):
        return f"the cache is a {type(cache).__name__} that is offloaded, or has other layers"
    if not updates_as_stock(cache, Cache) or not all(
        type(layer) is VisualLayer or updates_as_stock(layer, type(layer)) for layer in cache.layers
    ):
        return "the cache or a layer of it has another update"
    return None


def model_why_not(model: nn.Module) -> str | None:
    """Why the model as it is now cannot run decode steps, or None."""
    if not isinstance(model, (stock.Qwen3VLForConditionalGeneration, qvl.QVLForConditionalGeneration)):
        return f"{type(model).__name__} is no model that generates"
    for module in (model, model.model, model.model.language_model):
        if not is_eligible(module, type(module), lm_head.Forwards) or not runs_library_code(
            module, "forward", "__call__"
        ):
            return f"{type(module).__name__} has hooks or another forward"
    if not runs_library_code(model, *_OF_THE_LOOP):
        return "another function prepares the inputs of a token"
    if _SAMPLE is None or not (GenerationMixin._sample is stock.Qwen3VLForConditionalGeneration._sample is _SAMPLE):
        return "another function chooses tokens"
    if not runs_library_code(model.model, "get_input_embeddings"):
        return "another function finds the embedding"
    if stock_is_patched():
        return "a function or class of transformers' Qwen3-VL was replaced"
    body = model.model.language_model
    if any(_has_users_hook(module) for module in (*body.modules(), model.lm_head) if module is not body):
        return "hooks, which may change the model while a token is computed"
    if not no_global_hooks() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "global hooks, or the call is traced"
    if _on_gpu(model):
        return step_gpu.why_not(model)
    device = _device(model)
    return step_cpu.why_not(model) if device.type == "cpu" else step_gpu.why_no_graphs(device)


def _device(model: nn.Module) -> torch.device:
    return next(model.model.language_model.parameters()).device


def _on_gpu(model: nn.Module) -> bool:
    """Whether the device runs captured decode steps."""
    return step_gpu.why_no_graphs(_device(model)) is None


def sample(
    model: nn.Module,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """``_sample`` of a call that ``why_not`` has nothing against."""
    chooser = Chooser(input_ids, processors, criteria, config, streamer)
    outputs = model._prefill(input_ids, config, kwargs, is_first_iteration=not config.is_assistant)
    kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
    ended = chooser.choose(outputs.logits[:, -1])
    del outputs  # the logits of a long prompt are large
    cache = kwargs[CACHE]
    if not ended:
        foreign = _foreign(streamer, *processors, *criteria)
        users = getattr(cache, "_is_user_defined", False)
        if foreign and users:  # the user may read the cache between two tokens
            step = StockStep(model, chooser, kwargs)
        else:
            release = not (users or foreign or config.return_dict_in_generate)
            step = _begin(model, chooser, kwargs, release=release, foreign=foreign)
        foreign = foreign and not isinstance(step, StockStep)
        choice, begun, prompt = chooser, step.length, chooser.sequences.shape[1]
        try:
            if isinstance(step, GpuStep) and not foreign:  # the user may change processors and criteria meanwhile
                choice = step.sampler(chooser) or chooser
            while not ended:
                logits = _next_logits(model, cache, step, choice, foreign)
                if logits is not None:
                    ended = choice.choose(logits)
                    continue
                choice.finish()
                ended, chosen = not bool(chooser.unfinished.any()), chooser.sequences.shape[1] - prompt
                step.end(begun + chosen)
                kwargs = model._update_model_kwargs_for_generation(
                    {}, kwargs, is_encoder_decoder=False, num_new_tokens=chosen
                )
                step, choice, foreign = StockStep(model, chooser, kwargs), chooser, False
            choice.finish()
        except BaseException:  # a streamer may raise; as in stock code, the cache then has all computed tokens
            step.end(step.length)
            raise
        step.end(begun + chooser.sequences.shape[1] - prompt)
    if streamer is not None:
        streamer.end()
    return chooser.result(chooser.sequences, cache)


def _next_logits(
    model: nn.Module, cache: Cache, step: "CpuStep | GpuStep | StockStep", choice: Chooser | Sampler, foreign: bool
) -> Tensor | None:
    """Logits of the tokens chosen last, or None where stock code must continue: model or cache have changed between two
    tokens, or memory is short.
    """
    if foreign and not (step.check() and model_why_not(model) is None and _cache_why_not(cache) is None):
        return None
    try:
        return step.run(choice.tokens)
    except StepFailed as error:
        _warn(error)
        return None


def _warn(error: StepFailed) -> None:
    warnings.warn(f"qvl_model: decoding goes on without CUDA graphs: {error}", RuntimeWarning, stacklevel=4)


def _foreign(*parts: object) -> bool:
    """Whether code of the user runs between two tokens: a streamer, processor or criterion. It may change the model."""
    return any(part is not None and _is_foreign(part) for part in parts)


def _has_users_hook(module: nn.Module) -> bool:
    """Whether there are hooks but those of transformers that record outputs."""
    return bool(module._forward_pre_hooks) or any(
        getattr(hook, "__module__", None) != output_capturing.__name__ for hook in module._forward_hooks.values()
    )


def _is_foreign(part: object, seen: tuple[object, ...] = ()) -> bool:
    """Whether an object is of the user's own class, or of transformers' with a method that was replaced, or that holds
    a function or an object of the user's (a streamer's tokenizer or queue).
    """
    theirs = type(part).__module__.startswith(("transformers.", "qvl_model."))
    if not theirs or type(part) is PrefixConstrainedLogitsProcessor or not runs_library_code(part, *_OF_A_TOKEN):
        return True
    seen = (*seen, part)
    return any(
        _is_foreign(value, seen)
        for value in getattr(part, "__dict__", {}).values()
        if (callable(value) or type(value).__module__.partition(".")[0] not in _PASSIVE)
        and not any(value is other for other in seen)
    )


def _begin(
    model: nn.Module, chooser: Chooser, kwargs: dict, *, release: bool, foreign: bool
) -> "CpuStep | GpuStep | StockStep":
    """The decode step that continues the prompt, at the positions that stock code gives the next token.

    Args:
        release: see ``GpuStep``.
        foreign: see ``CpuStep``. Such code has run for the first token.
    """
    # Layers of the cache may be new since the call was judged.
    if _cache_why_not(kwargs[CACHE]) is not None or foreign and model_why_not(model) is not None:
        return StockStep(model, chooser, kwargs)
    inputs = model.prepare_inputs_for_generation(chooser.sequences, next_sequence_length=1, **kwargs)
    positions, mask, cache = inputs.get("position_ids"), kwargs.get("attention_mask"), kwargs[CACHE]
    past = int(cache.get_seq_length())
    qwen = isinstance(model, stock.Qwen3VLForConditionalGeneration)
    if (
        positions is not None and qwen
    ):  # as the text model reads them: of four rows the first is not rotary; a single row is for all axes
        positions = positions[None] if positions.dim() == 2 else positions[-3:]
        positions = positions.expand(3, -1, -1) if positions.shape[0] == 1 else positions
    expected = (*((3,) if qwen else ()), chooser.sequences.shape[0], 1)
    if (
        positions is None
        or positions.is_floating_point()
        or tuple(positions.shape) != expected
        or mask is not None
        and tuple(mask.shape) != (expected[-2], past + 1)
    ):
        return StockStep(model, chooser, kwargs)
    if any(int(cache.layers[index].get_seq_length()) != past for index in cache_indices(model.model.language_model)):
        return StockStep(model, chooser, kwargs)  # for example, a model whose first layer was removed
    has_padding = mask is not None and not bool(mask.all())
    padding_mask = mask.bool() if has_padding else None
    if not _on_gpu(model):
        step = CpuStep.begin(model, cache, positions, padding_mask, foreign=foreign)
        return step or StockStep(model, chooser, kwargs)
    if step_gpu.why_failed(model, chooser.sequences.shape[0], past) is not None:
        return StockStep(model, chooser, kwargs)
    longest = chooser.criteria.max_length
    limit = None if longest is None else past + longest - chooser.sequences.shape[1]
    try:
        return GpuStep.begin(model, cache, positions, padding_mask, limit=limit, release=release)
    except StepFailed as error:
        _warn(error)
        return StockStep(model, chooser, kwargs)


class StockStep:
    """A token by the model's own forward, for calls that are not eligible for other steps after the prefill."""

    def __init__(self, model: nn.Module, chooser: Chooser, kwargs: dict) -> None:
        self._model, self._chooser, self._kwargs = model, chooser, kwargs

    def run(self, tokens: Tensor) -> Tensor:
        inputs = self._model.prepare_inputs_for_generation(
            self._chooser.sequences, next_sequence_length=1, **self._kwargs
        )
        outputs = self._model(**inputs, return_dict=True)
        self._kwargs = self._model._update_model_kwargs_for_generation(outputs, self._kwargs, is_encoder_decoder=False)
        return outputs.logits[:, -1]

    @property
    def length(self) -> int:
        return int(self._kwargs[CACHE].get_seq_length())

    def check(self) -> bool:
        return True

    def end(self, length: int) -> None:
        """Nothing to do, since the model's forward updates the cache."""
