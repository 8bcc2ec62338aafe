"""Another place of the modules in ``qvl_model.quantization.modules``, for code written with it."""

from qvl_model.quantization.modules import FORMATS, PackedEmbedding, PackedLinear

__all__ = ["FORMATS", "PackedEmbedding", "PackedLinear"]
