"""QVL with a language head: the plain class, but for where tokens are chosen and how the loss is computed."""

from collections.abc import Callable

from transformers.loss.loss_utils import ForCausalLMLoss

from qvl_model.modules.generation import GeneratesByStep
from qvl_model.modules.lm_head import causal_loss
from qvl_model.quantization.checkpoint import QuantizedSaving
from qvl_model.qvl import modeling

__all__ = ["QVLForConditionalGeneration"]


class QVLForConditionalGeneration(GeneratesByStep, QuantizedSaving, modeling.QVLForConditionalGeneration):
    """The plain class, with a loss that skips logits that are not read, quantised weights on disk, and decode steps."""

    @property
    def loss_function(self) -> Callable:
        function = modeling.QVLForConditionalGeneration.loss_function.fget(self)
        return causal_loss if function is ForCausalLMLoss else function

    @loss_function.setter
    def loss_function(self, value: Callable) -> None:
        modeling.QVLForConditionalGeneration.loss_function.fset(self, value)
