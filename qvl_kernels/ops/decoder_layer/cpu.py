import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.library import register
from qvl_kernels.ops.attention.cpu import mask_arguments

__all__ = ["decoder_layer_op"]


def _decoder_layer_cpu(x, norms, weights, biases, cos, sin, k_cache, v_cache, past, mask, num_heads, eps, scale):
    batch, time, hidden = x.shape
    _, kv_heads, _, head_dim = k_cache.shape
    out = torch.empty(x.shape, dtype=x.dtype)
    kind, pointer, mask_strides = mask_arguments(mask, (batch, num_heads, time, past + time))
    bias_pointers = [0 if bias is None else bias.data_ptr() for bias in biases] + [0, 0, 0]
    dispatch.extension().decoder_layer(
        x.data_ptr(), out.data_ptr(), [norm.data_ptr() for norm in norms],
        [(w.data_ptr(), w.stride(0), bias) for w, bias in zip(weights, bias_pointers)], cos.data_ptr(), sin.data_ptr(),
        (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)), (sin.stride(0) if sin.shape[0] > 1 else 0, sin.stride(1)),
        k_cache.data_ptr(), v_cache.data_ptr(), k_cache.stride()[:3], v_cache.stride()[:3], batch, time, past, hidden,
        num_heads, kv_heads, head_dim, weights[4].shape[0], kind, pointer, mask_strides, eps, scale, DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out


decoder_layer_op = register(
    "decoder_layer(Tensor x, Tensor[] norms, Tensor[] weights, Tensor?[] biases, Tensor cos, Tensor sin, Tensor(a!) k_cache,"
    " Tensor(b!) v_cache, int past, Tensor? mask, int num_heads, float eps, float scale) -> Tensor",
    cpu=_decoder_layer_cpu,
    fake=lambda x, *rest: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
