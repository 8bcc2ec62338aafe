"""accelerate and restore: layers and leaf modules of a stock model change class; parameters stay where they are."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

import qvl_kernels
from qvl_kernels import config
from qvl_model.generation import loop, step_gpu
from qvl_model.generation.sampling_gpu import MODES
from qvl_model.modules.chunked_mlp import check_chunk_size, set_chunk_size
from qvl_model.modules.decoder_layer import forget_fused_layer
from qvl_model.modules.fast_path import FAST_DTYPES, FLASH
from qvl_model.modules.lm_head import set_skip_logits
from qvl_model.modules.text import Qwen3VLTextAttention, Qwen3VLTextMLP
from qvl_model.modules.vision import Qwen3VLVisionAttention, Qwen3VLVisionMLP, return_freed_memory
from qvl_model.modules.vision_tables import provide_tables
from qvl_model.quantization import bits as bits_of_layers
from qvl_model.quantization import calibration_set, precision
from qvl_model.quantization.calibration import Inputs, check_inputs
from qvl_model.quantization.convert import (
    dequantize_model,
    fold_again,
    formats_in,
    formats_of,
    is_quantized,
    part_of,
    quantize_model,
)
from qvl_model.quantization.modules import PackedEmbedding, PackedLinear
from qvl_model.qvl.modeling import QVLForConditionalGeneration
from qvl_model.replacements import MODEL_CLASSES, STOCK_CLASSES, replacement
from qvl_model.self_check import why_stock
from qvl_model.tuning import describe_kernels, settle_kernels

__all__ = ["Report", "accelerate", "is_accelerated", "release", "report", "restore"]

_MLPS = (Qwen3VLTextMLP, Qwen3VLVisionMLP)  # QVL's too
_KEPT_REASONS = {
    "Qwen3VLTextRotaryEmbedding": "computes small tables once per forward",
    "Qwen3VLVisionPatchMerger": "its norm and linear layers are replaced one by one",
    "Embedding": "a row look-up",
    "Conv3d": "Qwen3VLVisionPatchEmbed multiplies its weight as a matrix",
    "Conv2d": "QVLPatchEmbed multiplies its weight as a matrix",
    "QVLVisionPositions": "a table, interpolated once per image size",
    "QVLFusion": "adds what its attention, which is replaced, reads from the image",
    "QVLConnectorLayer": "its attention, MLP, norm and linear layers are replaced one by one",
    "QVLAttentionConnector": "its layers are replaced one by one",
    "QVLMLPConnector": "its MLP is replaced",
}

_ATTENTION = {  # (part, implementation) -> what computes it
    ("text", "sdpa"): "in the fused layers; by the attention kernels where layers are not fused (training)",
    (
        "text",
        "eager",
    ): "in the fused layers; by stock's formula where layers are not fused (training, or attentions are asked for)",
    **{
        ("text", name): "in the fused layers; by its own functions where layers are not fused (training)"
        for name in FLASH
    },
    (
        "text",
        "flex_attention",
    ): "by its own functions for prompts and in training; in the fused layers for tokens that generate makes",
    **{
        ("vision", name): "in the fused blocks, and by the attention kernels where blocks are not fused (training)"
        for name in ("sdpa", *FLASH)
    },
}


Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Report:
    """What ``accelerate`` replaced (or would replace) in a model, and what it left alone, with the reason.

    Attributes:
        accelerated: whether the model is accelerated now.
        replaced: (module name, stock class, our class).
        kept: (module name, class, reason).
        attention: what computes it, by the implementation that the config names.
        decoding: how ``generate`` makes tokens on the model's device.
        bits: quantised layers by kind and format, with their bits per weight.
        kernels: whose CPU kernel does each kind of work, and its time against the other's.
    """

    accelerated: bool
    attention: str
    decoding: str
    bits: list[bits_of_layers.Row] = field(default_factory=list)
    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    kept: list[tuple[str, str, str]] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = ["replaced:" if self.accelerated else "not accelerated; accelerate would replace:"]
        lines += _summary((stock_class, f"-> {ours}") for _, stock_class, ours in self.replaced)
        lines.append("kept:")
        lines += _summary((name, reason) for _, name, reason in self.kept)
        if self.bits:
            lines.append(f"bits per weight: {bits_of_layers.average(self.bits):.2f} on average")
            lines += [f"  {row.layers:4d} x {row.kind} {row.format}: {row.bits:.2f}" for row in self.bits]
        lines += [f"attention: {self.attention}", f"decoding: {self.decoding}"]
        if self.kernels:
            lines += ["CPU kernels, by qvl or by PyTorch:", *(f"  {line}" for line in self.kernels)]
        return "\n".join(lines)


def _summary(rows: Iterable[tuple[str, str]]) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    return [f"  {count:4d} x {name} {what}" for (name, what), count in counts.items()]


def _base_model(model: nn.Module) -> PreTrainedModel:
    """The model inside, through a PEFT wrapper if there is one."""
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, MODEL_CLASSES):
        accepted = ", ".join(cls.__name__ for cls in MODEL_CLASSES)
        raise TypeError(f"qvl_model takes {accepted} (or a PEFT model around one), got {type(model).__name__}")
    return inner


def _check(model: nn.Module) -> None:
    """Raises before anything is changed if the model cannot be accelerated."""
    foreign = (
        getattr(model, "hf_quantizer", None) is not None
        or getattr(model.config, "quantization_config", None) is not None
    )
    if foreign or any(".quantized" in type(module).__module__ for module in model.modules()):
        raise ValueError(
            "accelerate: the model is quantised by another library; load it unquantised (without quantization_config)"
        )
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise ValueError(
                f"accelerate: {name}: {type(parameter).__name__} (quantised or sharded by another library); "
                "accepted are plain parameters: accelerate the model before that, or load it without"
            )
        if parameter.is_meta:
            raise ValueError(f"accelerate: {name} is on the meta device; load the weights first (from_pretrained)")
        if parameter.dtype not in FAST_DTYPES:
            raise ValueError(
                f"accelerate: {name} is {parameter.dtype}; accepted are fp32, bf16 and fp16: call "
                f"model.to(torch.bfloat16) first"
            )


def accelerate(
    model: Model,
    *,
    weights: str | Mapping[str, str | None] | None = None,
    group: int | None = None,
    calibration: str | Mapping[str, Any] | Inputs | None = None,
    bits: float | None = None,
    mlp_rows: int | None = None,
    skip_logits: bool = True,
) -> Model:
    """Makes a stock Qwen3-VL model, or a QVL model, fast, in place; returns the same object.

    Parameters keep their values and layout, unless ``weights`` is given: ``state_dict``, ``save_pretrained``, ``.to()``
    and PEFT work as before. ``restore`` undoes it. On Linux CPUs the weights that every token reads are moved
    to 2 MB pages, at the same addresses (``qvl_kernels.use_huge_pages``; a second or two for 2 B parameters;
    QVL_HUGE_PAGES=0 switches it off). The first call on a machine measures for 0.3 s where PyTorch's CPU kernels are
    faster than ours, which are then used; QVL_TUNE=0 switches that off.

    Args:
        model: Qwen3VLForConditionalGeneration, Qwen3VLModel or their text or vision part, or the same of QVL, in fp32,
            bf16 or fp16; a PEFT model around one is taken too.
        weights: None, to use the dense weights; "int8" or "int4" quantises every linear layer, and an embedding tied to
            the head; {"text": "int4", "vision": "int8", "lm_head": None} chooses by part, and patterns of layer names,
            such as {"text": "int4", "*.down_proj": "int8"}, come before parts, the last one first. Quantised weights
            are constants: adapters on top of them train, they themselves do not, and an adapter is merged by quantising
            the sum. Adapters, and modules that you attached to the model, belong to no part and stay as they are; a
            pattern that matches nothing else, such as {"*value_head": "int8"}, means attached linear layers.
            ``save_pretrained`` writes quantised weights, ``from_pretrained`` of the drop-in classes reads them. In
            ``state_dict`` a quantised layer has ``weight_values`` and ``weight_scales`` in place of ``weight``; the
            attribute ``weight`` is dequantised when it is read, and what is written to it is quantised.
        group: inputs that share an int4 scale: 32, 64 or 128; None for 32.
        calibration: None; or inputs of the model, a list of what its processor returns, on which input scales are
            chosen that make the quantised layers more accurate at no cost in speed; or "default", texts and images that
            come with the package. Norm weights in ``state_dict`` are then divided by the scales of their channels.
            Adapters fit as before: a layer that gets one has its own weights back, and divides its input itself.
        bits: the average bits per weight, at most 8, that the layers which a part of ``weights`` makes int4 may take;
            None for 4.85. The most sensitive of them are int8, by their errors in calibration or else by a fixed rule.
            Layers that a pattern names keep its format: {"*": "int4"} is int4 everywhere.
        mlp_rows: None, or the chunk size of MLPs in tokens, to save memory: the intermediate activation, several times
            as wide as the input, exists for one chunk only, and in training the backward recomputes it.
        skip_logits: whether a training step computes its logits only if they are read, which saves the largest tensors
            of the step. They can be read until the backward, the next forward, or a change of weights; then reading
            raises RuntimeError. False: they are computed in every forward. ``model(..., skip_logits=False)`` does so
            for one call.
    Returns:
        model.
    Raises: TypeError for another class or type; ValueError for meta weights, foreign quantisation, unsupported dtypes,
        unknown formats, parts or groups, and for quantising weights that are not finite, have an adapter merged into
        them, or are quantised in another format, for calibration without weights or of quantised layers, and for
        quantised layers on an untested version of transformers with which they do not give stock's results. The model
        is then as it was, also if it raises on the inputs.
    Example:
        >>> model = Qwen3VLForConditionalGeneration.from_pretrained(path)
        >>> model = qvl_model.accelerate(model)
        >>> model = qvl_model.accelerate(model, weights="int8", calibration="default")
    """
    formats = formats_of(weights)
    precision.check_bits(bits)
    if calibration is not None and not (isinstance(calibration, str) and calibration == calibration_set.DEFAULT):
        calibration = check_inputs(calibration)
    check_chunk_size(mlp_rows)
    if not isinstance(skip_logits, bool):
        raise TypeError(f"accelerate: skip_logits must be a bool, got {skip_logits!r}")
    inner = _base_model(model)
    _check(inner)
    qvl_kernels.use_huge_pages(())  # raises for a bad QVL_HUGE_PAGES before anything is changed
    config.tuning_wanted()  # likewise
    reason = _why_stock(inner, formats, group, mlp_rows)
    if reason is not None:
        if is_quantized(inner):
            raise ValueError(f"accelerate: only qvl's layers can run quantised weights, and must not: {reason}")
        warnings.warn(f"qvl_model: the model stays stock: {reason}", stacklevel=2)
        return model
    inputs = calibration_set.inputs_of(inner) if isinstance(calibration, str) else calibration
    _forget_fused_layers(inner)
    quantize_model(inner, formats, group, inputs, bits)
    if inputs is not None:
        calibration_set.remember(inner, "default" if isinstance(calibration, str) else "own", inputs)
    fold_again(inner)
    _replace(inner, mlp_rows)
    if hasattr(inner, "lm_head"):
        set_skip_logits(inner, skip_logits)
    qvl_kernels.use_huge_pages(_read_by_every_token(inner))
    settle_kernels(inner)
    return model


def _why_stock(
    model: PreTrainedModel, formats: Mapping[str, str | None], group: int | None, mlp_rows: int | None
) -> str | None:
    """Why this version of transformers keeps the model stock, or None."""
    formats = {**formats_in(model), **formats}
    return why_stock(
        model,
        lambda small: _change(small, formats, group, mlp_rows),
        (tuple(sorted(formats.items())), group, mlp_rows),
    )


def _change(model: PreTrainedModel, formats: Mapping[str, str | None], group: int | None, mlp_rows: int | None) -> None:
    quantize_model(model, formats, group)
    _replace(model, mlp_rows)


def _replace(model: nn.Module, mlp_rows: int | None) -> None:
    _replace_modules(model)
    for module in model.modules():
        if isinstance(module, _MLPS):
            set_chunk_size(module, mlp_rows)


def _replace_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        ours = replacement(name, module)
        if ours is not None:
            module.__class__ = ours
        if isinstance(module, Qwen3VLVisionModel) and provide_tables not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(provide_tables, with_kwargs=True)
            module.register_forward_pre_hook(return_freed_memory)
            module.register_forward_hook(return_freed_memory)


def _forget_fused_layers(model: nn.Module) -> None:
    """Drops fused layers and captured decode steps, which hold weights that are about to be replaced."""
    step_gpu.release(model)
    for module in model.modules():
        forget_fused_layer(module)


def _read_by_every_token(model: nn.Module) -> Iterator[Tensor]:
    for name, module in model.named_modules():
        if part_of(model, name) != "vision" and not isinstance(module, nn.Embedding):
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)  # quantised weights


def restore(model: Model) -> Model:
    """Turns the model back into the stock one, in place; a model that is not accelerated stays as it is. Dense weights
    of quantised layers are read again from the checkpoint that the model was loaded from.

    Raises: TypeError for another class than ``accelerate`` takes; ValueError for quantised weights whose checkpoint is
    not known.
    Example:
        >>> model = qvl_model.restore(model)
    """
    inner = _base_model(model)
    _forget_fused_layers(inner)
    dequantize_model(inner)
    calibration_set.put(inner, None)
    if hasattr(inner, "lm_head"):
        set_skip_logits(inner, None)
    for module in inner.modules():
        set_chunk_size(module, None)
        theirs = STOCK_CLASSES.get(type(module))
        if theirs is not None:
            module.__class__ = theirs
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for handle in [handle for handle, hook in hooks.items() if hook in (provide_tables, return_freed_memory)]:
                del hooks[handle]
                module._forward_pre_hooks_with_kwargs.pop(handle, None)
    return model


def release(model: nn.Module) -> None:
    """Frees what ``generate`` keeps for the next call on a GPU: captured decode steps and their buffers, of this model
    and of models that it is part of. The next call captures again. Calls that run now keep theirs until they end. On
    the CPU, and for a stock model, nothing is kept.

    The memory goes to PyTorch's allocator; ``torch.cuda.empty_cache()`` returns it to the device.

    Args:
        model: what ``accelerate`` takes.
    Raises: TypeError for another class.
    Example:
        >>> answer = model.generate(**inputs)
        >>> qvl_model.release(model)
    """
    step_gpu.release(_base_model(model))


def is_accelerated(model: nn.Module) -> bool:
    """Whether any module of the model is one of ours.

    Example:
        >>> qvl_model.is_accelerated(qvl_model.accelerate(model))
        True
    """
    return any(type(module) in STOCK_CLASSES for module in model.modules())


def report(model: nn.Module) -> Report:
    """Lists what is replaced (on a stock model: would be), what is not, and why.

    Raises: TypeError for another class than ``accelerate`` takes.
    Example:
        >>> print(qvl_model.report(model))
    """
    inner = _base_model(model)
    result = Report(
        accelerated=is_accelerated(inner),
        attention=_attention(inner),
        decoding=_decoding(inner),
        bits=bits_of_layers.rows(inner),
        kernels=describe_kernels(inner),
    )
    for name, module in inner.named_modules():
        cls = type(module)
        if isinstance(module, PackedLinear | PackedEmbedding):
            theirs = "Linear" if isinstance(module, PackedLinear) else "Embedding"
            result.replaced.append((name, theirs, f"{cls.__module__}.{cls.__name__} (int{module.quantized.bits})"))
        elif cls in STOCK_CLASSES:
            result.replaced.append((name, STOCK_CLASSES[cls].__name__, f"{cls.__module__}.{cls.__name__}"))
        elif (ours := replacement(name, module)) is not None:
            result.replaced.append((name, cls.__name__, f"{ours.__module__}.{ours.__name__}"))
        elif not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            result.kept.append((name, cls.__name__, _kept_reason(module)))
    return result


def _attention(model: nn.Module) -> str:
    parts = {}
    for name, module in model.named_modules():
        if isinstance(module, (Qwen3VLTextAttention, Qwen3VLVisionAttention)):
            parts["vision" if part_of(model, name) == "vision" else "text"] = module.config._attn_implementation
    if not is_accelerated(model) or not parts:
        return "stock's own"
    return "; ".join(
        f"{part}, {name}: {_ATTENTION.get((part, name), 'by its own functions, nothing fused')}"
        for part, name in parts.items()
    )


def _decoding(model: nn.Module) -> str:
    if not is_accelerated(model):
        return "transformers' own loop"
    reason = loop.model_why_not(model)
    if reason is not None:
        return f"transformers' own loop over fused layers ({reason})"
    per_layer = isinstance(model, QVLForConditionalGeneration)
    others = "one fused call per layer and token" if per_layer else "all layers of a token in one call"
    if step_gpu.why_not(model) is None:
        return f"whole steps as CUDA graphs, and the choice of tokens for {MODES}; other loops: {others}"
    return f"all layers of a token in one call for greedy and sampling; other loops: {others}"


def _kept_reason(module: nn.Module) -> str:
    if isinstance(module, MODEL_CLASSES):
        return "a model's own forward is never replaced"
    if any(True for _ in module.children()):
        return _KEPT_REASONS.get(
            type(module).__name__, "not a class that qvl_model knows; its children are judged one by one"
        )
    if not any(True for _ in module.parameters()) and type(module).__name__ not in _KEPT_REASONS:
        return "runs inside the fused calls, or is small"
    return _KEPT_REASONS.get(type(module).__name__, "not a class that qvl_model knows")
