"""Loading quantised checkpoints, and quantising a checkpoint."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from qvl_model import capacity, loader
from qvl_model.accelerate import accelerate
from qvl_model.checkpoint_files import load_config
from qvl_model.modules.generation import Qwen3VLForConditionalGeneration
from qvl_model.quantization import calibration_set, external
from qvl_model.quantization.checkpoint import AGAIN, copy_files, fill, published, read, save
from qvl_model.quantization.convert import METHOD, is_quantized_checkpoint, method_of, section_of
from qvl_model.qvl import QVLForConditionalGeneration

__all__ = ["load", "one_device", "quantize"]

# Arguments of from_pretrained about finding files, which are local here, and about loading with less memory.
_IGNORED = {
    "_fast_init",
    "adapter_kwargs",
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "offload_folder",
    "offload_state_dict",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
}


def quantize(
    source: str | os.PathLike,
    out: str | os.PathLike,
    formats: dict[str, str | None],
    group: int | None = None,
    calibration: str | None = None,
    bits: float | None = None,
    replace: bool = False,
) -> None:
    """Quantises a checkpoint directory into another one, layer by layer; the whole source is never in memory.

    Args:
        source: directory of a Qwen3-VL or QVL checkpoint in fp32, bf16 or fp16.
        out: directory that does not exist yet, or is empty, unless ``replace``.
        formats: by part, as ``qvl_model.quantization.convert.formats_of`` gives them.
        group: inputs per int4 scale; None for 32.
        calibration: None, "default", or a JSONL file as ``calibration_set.read`` takes it.
        bits: as ``accelerate`` takes it.
        replace: whether files that are in ``out`` are replaced.
    Raises: ValueError for weights that are missing, hold NaN or Inf, or cannot be quantised, tensors that config.json
        has no place for, a source that is quantised already, and an ``out`` in use.
    Example:
        >>> quantize("qwen3-vl-2b", "qwen3-vl-2b-int8", formats_of("int8"))
    """
    source, out = Path(source), Path(out)
    if is_quantized_checkpoint(source) and method_of(source) != "fp8":
        raise ValueError(f"{source} is quantised already; quantise the checkpoint that it was made from")
    if not formats:
        raise ValueError("quantize: no part is to be quantised")
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not replace):
        raise ValueError(f"{out} exists; give a directory that does not")
    with published(out) as folder:
        save(_quantized(source, formats, group, calibration, bits), folder)
        copy_files(source, folder)


def _quantized(
    source: Path,
    formats: dict[str, str | None],
    group: int | None,
    calibration: str | None,
    bits: float | None,
) -> PreTrainedModel:
    # Not accelerated yet, which would move dense weights to huge pages that quantising cannot free.
    model = _built(source, load_config(source)) if method_of(source) == "fp8" else _dense(source)
    inputs = calibration_set.DEFAULT if calibration == calibration_set.DEFAULT else None
    if calibration is not None and inputs is None:
        inputs = calibration_set.read(Path(calibration), source)
    model = accelerate(
        model, weights=formats, group=group, calibration=inputs, bits=bits
    )  # this checks the weights that it quantises
    capacity.check_finite(model, source)
    return model


def _dense(source: Path) -> PreTrainedModel:
    """The model of a dense checkpoint, which must have all weights of its class, and no others."""
    model_class = _class_of(load_config(source))
    model, info = super(model_class, model_class).from_pretrained(
        source, dtype="auto", output_loading_info=True, trust_remote_code=False, local_files_only=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{source} lacks {len(info['missing_keys'])} of the model's weights, such as {min(info['missing_keys'])}"
        )
    if info["unexpected_keys"]:
        raise ValueError(
            f"{source} has {len(info['unexpected_keys'])} tensors that its config.json has no place for, such as "
            f"{min(info['unexpected_keys'])}; they would be lost"
        )
    return model


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    for model_class in (Qwen3VLForConditionalGeneration, QVLForConditionalGeneration):
        if isinstance(config, model_class.config_class):
            return model_class
    raise ValueError(f"a {config.model_type} model; qvl runs qwen3_vl and qvl")


def load(
    path: str | os.PathLike,
    model_class: type[PreTrainedModel] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    output_loading_info: bool = False,
    config: PreTrainedConfig | None = None,
    weights: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
    """The accelerated model of a quantised checkpoint, its tensors mapped from the file.

    Args:
        path: directory that qvl wrote, or one of a format in ``qvl_model.quantization.external``.
        model_class: Qwen3VLForConditionalGeneration or QVLForConditionalGeneration; None takes the one that config.json
            names.
        dtype: of tensors that are not quantised; None or "auto" for the one it was saved in.
        device_map: one device for all of it; None leaves it mapped, on the CPU.
        attn_implementation, output_loading_info, config: as from_pretrained takes them.
        weights: of an fp8 checkpoint: None makes its weights dense; "int8" quantises them one by one, and then the rest
            of the model as ``accelerate`` does.
    Raises: ValueError for files that are damaged, incomplete, of another version, or do not belong together, for
        settings of another tool that qvl does not run, and for ``weights`` of other checkpoints; TypeError for
        arguments that it does not know.
    Example:
        >>> model = load("qwen3-vl-2b-int8")
    """
    path = Path(path)
    dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
    if _method(kwargs.get("quantization_config")) == method_of(path):
        del kwargs["quantization_config"]  # that of config.json, handed on
    unknown = sorted({name for name, value in kwargs.items() if value is not None} - _IGNORED)
    if unknown:
        raise TypeError(
            f"from_pretrained: a quantised checkpoint takes dtype, device_map and attn_implementation, not "
            f"{', '.join(unknown)}"
        )
    config = load_config(path) if config is None else copy.deepcopy(config)
    model = _built(path, config, model_class, dtype, attn_implementation, weights)
    model = accelerate(model, weights=weights)
    if device_map is not None:
        model = model.to(one_device(device_map))
    nothing = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model, nothing) if output_loading_info else model


def _method(quantization_config: Any) -> str | None:
    settings = quantization_config if isinstance(quantization_config, Mapping) else vars(quantization_config or object)
    return settings.get("quant_method")


def _built(
    path: Path,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    weights: str | None = None,
) -> PreTrainedModel:
    """The model of a quantised checkpoint as ``load`` returns it, before it is accelerated."""
    vars(config).pop("quantization_config", None)  # it describes the files, which are read here
    section, advice = section_of(path) or {}, external.ADVICE
    if weights is not None and method_of(path) != "fp8":
        raise ValueError(f"from_pretrained: {path} is quantised already; weights={weights!r} is for fp8 checkpoints")
    if weights not in (None, "int8"):
        raise ValueError(f'from_pretrained: weights of an fp8 checkpoint may be None or "int8", got {weights!r}')
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    dtype = config.dtype or config.get_text_config().dtype if dtype in (None, "auto") else dtype
    if method_of(path) == METHOD:
        (tensors, shared), advice = read(path, section), AGAIN
    else:
        tensors, shared = external.read(path, section, weights=weights, dtype=dtype, tied=config.tie_word_embeddings)
    dtype = dtype or next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        model = (model_class or _class_of(config))._from_config(config, dtype=dtype, **chosen)
    fill(model, tensors, shared, dtype, path, advice)
    calibration_set.put(model, section.get("calibration"))
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    return model.eval()


def _load_quantized(
    path: str | os.PathLike, model_class: type[PreTrainedModel], /, **kwargs: Any
) -> PreTrainedModel | tuple[PreTrainedModel, dict] | None:
    """The model of a directory of quantised weights, or None for any other."""
    return load(path, model_class, **kwargs) if is_quantized_checkpoint(path) else None


def one_device(device_map: Any) -> torch.device:
    """The device of a ``device_map`` that puts a whole model on one. Raises: ValueError for any other."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, Mapping) or device_map in ("balanced", "balanced_low_0", "sequential"):
        raise ValueError(f"from_pretrained: a quantised checkpoint goes to one device, got device_map={device_map!r}")
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device_map)


loader.provide(load_quantized=_load_quantized, accelerate=accelerate)
