"""Quantised checkpoints and quantising through transformers' own ``from_pretrained``, and the Auto classes.

Importing ``qvl_model`` registers the quantisation method "qvl": ``from_pretrained`` of stock and Auto classes, and so
pipelines and other libraries, then load directories of quantised weights as accelerated models. transformers reads the
tensors, mapped from the file where they stay on the CPU. ``register`` makes dense checkpoints load accelerated too.
"""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3VLConfig,
)
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor as StockProcessor
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import is_torchvision_available
from transformers.utils.quantization_config import QuantizationConfigMixin

from qvl_model.accelerate import accelerate
from qvl_model.checkpoint_files import check_attention_names
from qvl_model.modules.generation import Qwen3VLForConditionalGeneration
from qvl_model.pretrained import one_device
from qvl_model.processing import load_processor
from qvl_model.quantization import calibration_set, checkpoint, convert, precision
from qvl_model.quantization.modules import PackedEmbedding, PackedLinear

__all__ = ["QuantizationConfig", "register"]


@register_quantization_config(convert.METHOD)
class QuantizationConfig(QuantizationConfigMixin):
    """For ``quantization_config`` of transformers' ``from_pretrained``: the model is accelerated and quantised once it
    is loaded.

    Args:
        weights, group, calibration, bits: as ``accelerate`` takes them.
    Raises: TypeError and ValueError as ``accelerate`` does.
    Example:
        >>> config = qvl_model.QuantizationConfig("int4", calibration="default")
        >>> model = AutoModelForImageTextToText.from_pretrained(path, quantization_config=config)
    """

    def __init__(
        self, weights: Any = "int8", *, group: int | None = None, calibration: Any = None, bits: float | None = None
    ) -> None:
        self.quant_method = convert.METHOD
        self.weights, self.group, self.calibration, self.bits = weights, group, calibration, bits
        convert.formats_of(weights)
        precision.check_bits(bits)

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A dictionary of the arguments, or the ``quantization_config`` of a directory, as ``checkpoint`` writes it."""
        settings = {name: value for name, value in config_dict.items() if name != "quant_method"}
        if "version" in settings:
            config = cls()
            vars(config).update(settings)
        else:
            config = cls(**settings)
        return (config, kwargs) if return_unused_kwargs else config

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weights={self.weights!r}, group={self.group}, bits={self.bits})"


@register_quantizer(convert.METHOD)
class _Quantizer(HfQuantizer):
    """What transformers calls while it loads a model with a ``QuantizationConfig``."""

    def update_device_map(self, device_map: Any) -> dict[str, torch.device] | None:
        self._device = None if device_map is None else one_device(device_map)
        return None if self._device is None else {"": self._device}

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called before files are looked for: without qvl, transformers finds none and says so."""
        if self.pre_quantized:
            check_attention_names(config)
            config.transformers_weights = checkpoint.FILE
        return config

    update_tp_plan = update_attn_implementation  # which older versions call in its place

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Turns layers whose weights are quantised in the file into quantised ones."""
        if not self.pre_quantized:
            return
        self._dtype = dtype or model.dtype
        if checkpoint_files is None:
            raise ValueError(
                "from_pretrained: weights quantised by qvl are read from a directory, not from a state_dict"
            )
        path = Path(checkpoint_files[0]).parent
        with torch.device("cpu"):
            tensors, shared = checkpoint.read(path, vars(self.quantization_config))
            tensors, self._shared = _of_the_model(model, tensors, shared)
            checkpoint.convert_layers(model, tensors, path)
        others = {name.rpartition(".")[0] for name in self._shared}  # transformers ties these modules to their first
        wanted, found = (
            {name: tensor for name, tensor in named.items() if name.rpartition(".")[0] not in others}
            for named in (model.state_dict(), tensors)
        )
        checkpoint.check_names(wanted, found, path)
        for module in model.modules():
            if isinstance(module, PackedLinear | PackedEmbedding):
                module._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """The model as ``qvl_model`` makes it: accelerated, its layers quantised, no longer transformers' business."""
        config = self.quantization_config
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        if not self.pre_quantized:
            return accelerate(
                model, weights=config.weights, group=config.group, calibration=config.calibration, bits=config.bits
            )
        vars(model.config).pop("transformers_weights", None)
        for name, first in self._shared.items():
            if name.endswith(".weight_values"):
                _tie(*(model.get_submodule(one.removesuffix(".weight_values")) for one in (name, first)))
        for parameter in model.parameters():  # those of quantised layers are empty, and in no file
            parameter.data = parameter.data.to(self._device, self._dtype)
        calibration_set.put(model, vars(config).get("calibration"))
        return accelerate(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _of_the_model(model: PreTrainedModel, tensors: dict, shared: dict[str, str]) -> tuple[dict, dict[str, str]]:
    """Tensors and shared names under their names in ``model``, which may be the model below the head."""
    if isinstance(model, stock.Qwen3VLForConditionalGeneration):
        return tensors, shared
    if not isinstance(model, stock.Qwen3VLModel):
        raise ValueError(
            f"from_pretrained: weights quantised by qvl are of a whole model, not of {type(model).__name__}; use "
            "AutoModelForImageTextToText or AutoModel"
        )
    prefix = "model."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return own, {name: first for name, first in shared.items() if name.startswith(prefix)}


def _tie(module: nn.Module, first: nn.Module) -> None:
    """Makes a module, dense and tied to a quantised one by transformers, quantised like it."""
    kind: Any = PackedLinear if isinstance(module, nn.Linear) else PackedEmbedding
    kind.convert(module, first.quantized)
    module.weight = first.weight


def register() -> None:
    """Makes transformers' Auto classes, and so pipelines and other libraries, load Qwen3-VL accelerated.

    AutoModelForImageTextToText and AutoModelForMultimodalLM then make ``qvl_model.Qwen3VLForConditionalGeneration``.
    Without torchvision, which stock's processor needs for videos, the processor of a local checkpoint is qvl's, for
    text and images.
    Raises: RuntimeError on versions of transformers whose Auto classes keep their own classes, 5.17 among them.
    Example:
        >>> qvl_model.register()
        >>> answer = pipeline("image-text-to-text", model=path)
    """
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(Qwen3VLConfig, Qwen3VLForConditionalGeneration, exist_ok=True)
        if auto_class._model_mapping[Qwen3VLConfig] is not Qwen3VLForConditionalGeneration:
            raise RuntimeError(
                f"register: the Auto classes of transformers {transformers.__version__} keep stock's class; use "
                "transformers 5.23 or newer, or accelerate the model once it is loaded"
            )
    if not is_torchvision_available():
        StockProcessor.from_pretrained = classmethod(_processor_from_pretrained)  # type: ignore[assignment]


_stock_from_pretrained = StockProcessor.from_pretrained.__func__  # type: ignore[attr-defined]


def _processor_from_pretrained(cls: type[StockProcessor], path: str | os.PathLike, **kwargs: Any) -> StockProcessor:
    """``from_pretrained`` of stock's processor, which cannot be made without torchvision."""
    return load_processor(path) if os.path.isdir(path) else _stock_from_pretrained(cls, path, **kwargs)
