"""decoder_layer: public names."""

from qvl_kernels.ops.decoder_layer.api import DecoderWeights, decoder_layer

__all__ = ["DecoderWeights", "decoder_layer"]
