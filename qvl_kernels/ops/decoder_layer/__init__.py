"""decoder_layer: public names."""

from qvl_kernels.ops.decoder_layer.api import decoder_layer
from qvl_kernels.ops.decoder_layer.call import DecoderWeights

__all__ = ["DecoderWeights", "decoder_layer"]
