"""Qwen3-VL with a language head: stock, but for where tokens are chosen and how the loss is computed."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from qvl_model import loader
from qvl_model.checkpoint_files import check_attention
from qvl_model.generation import loop, step_gpu
from qvl_model.modules.lm_head import causal_loss
from qvl_model.quantization.checkpoint import QuantizedSaving

__all__ = ["GeneratesByStep", "Qwen3VLForConditionalGeneration"]


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation import GenerationMixin

    class _Model(PreTrainedModel, GenerationMixin): ...

else:
    _Model = object  # GeneratesByStep comes before the class of a model, which has these methods


class GeneratesByStep(_Model):
    """For models that generate: runs decode steps of ``generation.loop`` where they compute what the model's modules
    compute.
    """

    def train(self, mode: bool = True) -> Self:
        if mode:  # captured decode steps hold memory that training needs
            step_gpu.release(self)
        return super().train(mode)

    def _sample(  # type: ignore[override]  # generate passes the other arguments by name
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> Any:
        """Greedy and sampling: ``generate`` calls this once its inputs are prepared."""
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if loop.why_not(self, input_ids, generation_config, options) is None:
            return loop.sample(self, *arguments, **options)
        # transformers types ``self`` and ``input_ids`` for its own type checker: models and tensors do not fit.
        return super()._sample(*arguments, **options)  # type: ignore[misc, arg-type]


# QuantizedSaving.save_pretrained takes by name what stock's takes by position too.
class Qwen3VLForConditionalGeneration(  # type: ignore[misc]
    GeneratesByStep, QuantizedSaving, stock.Qwen3VLForConditionalGeneration
):
    """The stock class whose ``from_pretrained`` returns an accelerated model, also for quantised checkpoints.
    Saved configs name the stock class.

    Example:
        >>> from qvl_model import Qwen3VLForConditionalGeneration
        >>> model = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16)
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]  # stock's also takes None for the path, with a state_dict
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Self:
        check_attention(pretrained_model_name_or_path, **kwargs)
        quantised = loader.load_quantized(pretrained_model_name_or_path, cls, **kwargs)
        if quantised is not None:
            return quantised
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **{"trust_remote_code": False, **kwargs})
        if isinstance(loaded, tuple):  # output_loading_info=True
            return loader.accelerate(loaded[0]), *loaded[1:]
        return loader.accelerate(loaded)

    @property
    def loss_function(self) -> Callable:
        """The stock loss, or instead of the causal loss ours, which is equal to it and takes lazy logits too."""
        # mypy takes a property with a setter, read from its class, for a function.
        function = stock.Qwen3VLForConditionalGeneration.loss_function.fget(self)  # type: ignore[attr-defined]
        return causal_loss if function is ForCausalLMLoss else function

    @loss_function.setter
    def loss_function(self, value: Callable) -> None:
        stock.Qwen3VLForConditionalGeneration.loss_function.fset(self, value)  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:  # transformers looks functions up in the module of a class
    return getattr(stock, name)
