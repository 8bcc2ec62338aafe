import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.ops.attention.cpu import mask_arguments
from qvl_kernels.ops.decoder_layer.compose import compose_decoder_layer
from qvl_kernels.ops.linear.onednn import use_onednn
from qvl_kernels.ops.linear.weights import extension_weight

__all__ = ["decoder_layer_cpu"]


def decoder_layer_cpu(x, norms, weights, biases, cos, sin, k_cache, v_cache, past, mask, num_heads, eps, scale):
    if use_onednn(x, x.shape[0] * x.shape[1]):
        return compose_decoder_layer(x, norms, weights, biases, cos, sin, k_cache, v_cache, past, mask, num_heads, eps, scale)
    batch, time, hidden = x.shape
    _, kv_heads, _, head_dim = k_cache.shape
    out = torch.empty(x.shape, dtype=x.dtype)
    kind, pointer, mask_strides = mask_arguments(mask, (batch, num_heads, time, past + time))
    extension = dispatch.extension()
    layer = extension.DecoderLayer(
        [norm.data_ptr() for norm in norms], [extension_weight(weight, bias) for weight, bias in zip(weights, (*biases, None, None, None))],
        hidden, num_heads, kv_heads, head_dim, weights[4].shape[0], eps, scale, DTYPE_CODES[x.dtype],
    )  # fmt: skip
    extension.decoder_layers(
        [layer], x.data_ptr(), [out.data_ptr()], cos.data_ptr(), sin.data_ptr(),
        (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)), (sin.stride(0) if sin.shape[0] > 1 else 0, sin.stride(1)),
        [(k_cache.data_ptr(), v_cache.data_ptr(), k_cache.stride()[:3], v_cache.stride()[:3])], batch, time, past, kind, pointer, mask_strides,
    )  # fmt: skip
    return out
