"""layer_norm: public names."""

from qvl_kernels.ops.layer_norm.api import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "layer_norm"]
