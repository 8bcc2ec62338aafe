import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.ops.linear.onednn import use_onednn
from qvl_kernels.ops.linear.weights import extension_weight
from qvl_kernels.ops.vision_block.compose import compose_vision_block

__all__ = ["vision_block_cpu"]


def vision_block_cpu(x, norms, weights, biases, cos, sin, cu_seqlens, num_heads, eps):
    if use_onednn(x, x.shape[0]):
        return compose_vision_block(x, norms, weights, biases, cos, sin, cu_seqlens, num_heads, eps)
    tokens, hidden = x.shape
    head_dim = weights[0].shape[0] // (3 * num_heads)
    out = torch.empty(x.shape, dtype=x.dtype)
    dispatch.extension().vision_block(
        x=x.data_ptr(), out=out.data_ptr(), norms=[norm.data_ptr() for norm in norms],
        weights=[extension_weight(w, b) for w, b in zip(weights, biases)], cos=cos.data_ptr(), sin=sin.data_ptr(),
        cos_stride=cos.stride(0), sin_stride=sin.stride(0), cu_seqlens=cu_seqlens.data_ptr(), sequences=cu_seqlens.numel() - 1, tokens=tokens, hidden=hidden, heads=num_heads, head_dim=head_dim,
        mlp=weights[2].shape[0], eps=eps, scale=head_dim**-0.5, dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out
