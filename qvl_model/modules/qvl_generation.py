"""The top of QVL: the plain class, but for where tokens are chosen and how the loss is computed."""

from collections.abc import Callable

from transformers.loss.loss_utils import ForCausalLMLoss

from qvl_model.modules.generation import GeneratesByStep
from qvl_model.modules.lm_head import causal_loss
from qvl_model.quantization.checkpoint import PackedSaving
from qvl_model.qvl import modeling

__all__ = ["QVLForConditionalGeneration"]


class QVLForConditionalGeneration(GeneratesByStep, PackedSaving, modeling.QVLForConditionalGeneration):
    """The loss without logits where nobody reads them, packed weights saved, and tokens generated step by step; all
    else is the plain class.
    """

    @property
    def loss_function(self) -> Callable:
        function = modeling.QVLForConditionalGeneration.loss_function.fget(self)
        return causal_loss if function is ForCausalLMLoss else function

    @loss_function.setter
    def loss_function(self, value: Callable) -> None:
        modeling.QVLForConditionalGeneration.loss_function.fset(self, value)
