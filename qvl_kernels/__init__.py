"""Kernels for Qwen3-VL on CPU and GPU: public functions with a reference and fast backends, on tensors only."""

from importlib.metadata import PackageNotFoundError, version

from qvl_kernels.dispatch import backends, cpu_info, fallbacks, use_backend
from qvl_kernels.memory.huge_pages import use_huge_pages
from qvl_kernels.ops.attention import attention
from qvl_kernels.ops.cross_attention import cross_attention
from qvl_kernels.ops.decode_attention import decode_attention
from qvl_kernels.ops.decoder_layer import DecoderWeights, decoder_layer
from qvl_kernels.ops.decoder_layer.prepared import PreparedCache, PreparedDecoderLayer
from qvl_kernels.ops.decoder_layer.quantized import QuantizedDecoderLayer
from qvl_kernels.ops.gelu_tanh import gelu_tanh
from qvl_kernels.ops.layer_norm import add_layer_norm, layer_norm
from qvl_kernels.ops.linear import linear
from qvl_kernels.ops.linear_cross_entropy import linear_cross_entropy
from qvl_kernels.ops.patch_embed import patch_embed
from qvl_kernels.ops.quantized_linear import quantized_linear
from qvl_kernels.ops.rms_norm import add_rms_norm, rms_norm
from qvl_kernels.ops.rope import qk_norm_rope, vision_rope
from qvl_kernels.ops.swiglu import swiglu
from qvl_kernels.ops.vision_block import VisionWeights, vision_block

__all__ = [
    "DecoderWeights",
    "PreparedCache",
    "PreparedDecoderLayer",
    "QuantizedDecoderLayer",
    "VisionWeights",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "backends",
    "cpu_info",
    "cross_attention",
    "decode_attention",
    "decoder_layer",
    "fallbacks",
    "gelu_tanh",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "patch_embed",
    "qk_norm_rope",
    "quantized_linear",
    "rms_norm",
    "swiglu",
    "use_backend",
    "use_huge_pages",
    "vision_block",
    "vision_rope",
]

try:
    __version__ = version("qvl")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
