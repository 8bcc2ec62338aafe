"""torch op qvl::decoder_layer."""

import torch

from qvl_kernels.library import register
from qvl_kernels.ops.decoder_layer.cpu import decoder_layer_cpu
from qvl_kernels.ops.decoder_layer.unfused import unfused_decoder_layer

__all__ = ["decoder_layer_op"]

decoder_layer_op = register(
    "decoder_layer(Tensor x, Tensor[] norms, Tensor[] weights, Tensor?[] biases, Tensor cos, Tensor sin, Tensor(a!) "
    "k_cache,"
    " Tensor(b!) v_cache, int past, Tensor? mask, int num_heads, float eps, float scale) -> Tensor",
    cpu=decoder_layer_cpu,
    triton=unfused_decoder_layer,
    fake=lambda x, *rest: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
