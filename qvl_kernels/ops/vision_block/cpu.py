import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.library import register
from qvl_kernels.ops.attention.cpu import attention_op
from qvl_kernels.ops.gelu_tanh.cpu import gelu_tanh_op
from qvl_kernels.ops.layer_norm.cpu import add_layer_norm_op, layer_norm_op
from qvl_kernels.ops.linear.onednn import use_onednn
from qvl_kernels.ops.rope.cpu import vision_rope_op

__all__ = ["compose_vision_block", "vision_block_op"]


def _vision_block_cpu(x, norms, weights, biases, cos, sin, cu_seqlens, num_heads, eps):
    if use_onednn(x, x.shape[0]):
        return compose_vision_block(x, norms, weights, biases, cos, sin, cu_seqlens, num_heads, eps)
    tokens, hidden = x.shape
    head_dim = weights[0].shape[0] // (3 * num_heads)
    out = torch.empty(x.shape, dtype=x.dtype)
    dispatch.extension().vision_block(
        x=x.data_ptr(), out=out.data_ptr(), norms=[norm.data_ptr() for norm in norms],
        weights=[(w.data_ptr(), w.stride(0), b.data_ptr()) for w, b in zip(weights, biases)], cos=cos.data_ptr(),
        sin=sin.data_ptr(), cos_stride=cos.stride(0), sin_stride=sin.stride(0), cu_seqlens=cu_seqlens.data_ptr(),
        sequences=cu_seqlens.numel() - 1, tokens=tokens, hidden=hidden, heads=num_heads, head_dim=head_dim,
        mlp=weights[2].shape[0], eps=eps, scale=head_dim**-0.5, dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out


def compose_vision_block(x, norms, weights, biases, cos, sin, cu_seqlens, num_heads, eps):
    """The block from single ops, its linear layers through PyTorch: for machines whose matrix units make those faster."""
    linear = torch.nn.functional.linear
    tokens = x.shape[0]
    (qkv_w, proj_w, fc1_w, fc2_w), (qkv_b, proj_b, fc1_b, fc2_b) = weights, biases
    norm1_w, norm1_b, norm2_w, norm2_b = norms
    q, k, v = linear(layer_norm_op(x, norm1_w, norm1_b, eps), qkv_w, qkv_b).view(tokens, 3, num_heads, -1).unbind(1)
    q, k = vision_rope_op(q, k, cos, sin)
    attended, _ = attention_op(q, k, v, cu_seqlens, None, None, False, q.shape[-1] ** -0.5)
    normed, total = add_layer_norm_op(linear(attended.view(tokens, -1), proj_w, proj_b), x, norm2_w, norm2_b, eps)
    return total + linear(gelu_tanh_op(linear(normed, fc1_w, fc1_b), None), fc2_w, fc2_b)


vision_block_op = register(
    "vision_block(Tensor x, Tensor[] norms, Tensor[] weights, Tensor[] biases, Tensor cos, Tensor sin, Tensor cu_seqlens,"
    " int num_heads, float eps) -> Tensor",
    cpu=_vision_block_cpu,
    fake=lambda x, *rest: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
