"""QVL: the cross-attention vision-language model of the specification, with 32 layers of 32 heads in its preset
``qvl-2b``.

    from qvl_model.qvl import QVLConfig, QVLForConditionalGeneration

    model = QVLForConditionalGeneration(QVLConfig.from_preset("qvl-tiny")).eval()
    model = qvl_model.accelerate(model)
    answer = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=20)

Importing it makes AutoConfig, AutoModel and AutoModelForImageTextToText know the model. The modules are plain PyTorch
and stock transformers layers; ``qvl_model.accelerate`` replaces them as it does those of Qwen3-VL.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from qvl_model.qvl.configuration import QVLConfig
from qvl_model.qvl.modeling import QVLCausalOutput, QVLForConditionalGeneration, QVLModel, QVLModelOutput
from qvl_model.qvl.text import QVLTextModel, Visual
from qvl_model.qvl.vision import QVLVisionModel

__all__ = [
    "QVLCausalOutput",
    "QVLConfig",
    "QVLForConditionalGeneration",
    "QVLModel",
    "QVLModelOutput",
    "QVLTextModel",
    "QVLVisionModel",
    "Visual",
]

AutoConfig.register("qvl", QVLConfig, exist_ok=True)
AutoModel.register(QVLConfig, QVLModel, exist_ok=True)
AutoModelForImageTextToText.register(QVLConfig, QVLForConditionalGeneration, exist_ok=True)
