"""Stock class -> our subclass of it: all that ``accelerate`` replaces."""

from torch import nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from qvl_model.modules import decoder_layer, generation, linear, lm_head, qvl_generation, text, text_model, vision
from qvl_model.modules import qvl as qvl_modules
from qvl_model.qvl import QVLForConditionalGeneration, QVLModel, QVLTextModel, QVLVisionModel

__all__ = ["MODEL_CLASSES", "REPLACEMENTS", "STOCK_CLASSES", "replacement"]

REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    stock.Qwen3VLForConditionalGeneration: generation.Qwen3VLForConditionalGeneration,
    stock.Qwen3VLTextModel: text_model.Qwen3VLTextModel,
    stock.Qwen3VLTextDecoderLayer: decoder_layer.Qwen3VLTextDecoderLayer,
    stock.Qwen3VLTextAttention: text.Qwen3VLTextAttention,
    stock.Qwen3VLTextMLP: text.Qwen3VLTextMLP,
    stock.Qwen3VLTextRMSNorm: text.Qwen3VLTextRMSNorm,
    stock.Qwen3VLVisionBlock: vision.Qwen3VLVisionBlock,
    stock.Qwen3VLVisionAttention: vision.Qwen3VLVisionAttention,
    stock.Qwen3VLVisionMLP: vision.Qwen3VLVisionMLP,
    stock.Qwen3VLVisionPatchEmbed: vision.Qwen3VLVisionPatchEmbed,
    nn.Linear: linear.Linear,
    nn.LayerNorm: linear.LayerNorm,
    QVLForConditionalGeneration: qvl_generation.QVLForConditionalGeneration,
    **qvl_modules.REPLACEMENTS,
}
STOCK_CLASSES = {ours: theirs for theirs, ours in REPLACEMENTS.items()} | {lm_head.Linear: nn.Linear}
MODEL_CLASSES = (
    stock.Qwen3VLForConditionalGeneration,
    stock.Qwen3VLModel,
    stock.Qwen3VLTextModel,
    stock.Qwen3VLVisionModel,
    QVLForConditionalGeneration,
    QVLModel,
    QVLTextModel,
    QVLVisionModel,
)


def replacement(name: str, module: nn.Module) -> type[nn.Module] | None:
    """Our class for a module, by its class, and for the head by its name; or None."""
    if type(module) is nn.Linear and name == "lm_head":
        return lm_head.Linear
    return REPLACEMENTS.get(type(module))
