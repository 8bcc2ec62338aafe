"""The older import path of ``qvl_model.quantization.modules``, kept for users' code."""

from qvl_model.quantization.modules import FORMATS, PackedEmbedding, PackedLinear

__all__ = ["FORMATS", "PackedEmbedding", "PackedLinear"]
