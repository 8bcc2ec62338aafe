import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.library import register
from qvl_kernels.ops.attention.cpu import attention_op, mask_arguments
from qvl_kernels.ops.linear.onednn import use_onednn
from qvl_kernels.ops.rms_norm.cpu import add_rms_norm_op, rms_norm_op
from qvl_kernels.ops.rope.cpu import qk_norm_rope_op
from qvl_kernels.ops.swiglu.op import swiglu_op

__all__ = ["compose_decoder_layer", "decoder_layer_op"]


def _decoder_layer_cpu(x, norms, weights, biases, cos, sin, k_cache, v_cache, past, mask, num_heads, eps, scale):
    if use_onednn(x, x.shape[0] * x.shape[1]):
        return compose_decoder_layer(x, norms, weights, biases, cos, sin, k_cache, v_cache, past, mask, num_heads, eps, scale)
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


def compose_decoder_layer(x, norms, weights, biases, cos, sin, k_cache, v_cache, past, mask, num_heads, eps, scale):
    """The layer from single ops, its linear layers through PyTorch: for machines whose matrix units make those faster."""
    linear = torch.nn.functional.linear
    batch, time, _ = x.shape
    kv_heads, head_dim, end = k_cache.shape[1], k_cache.shape[3], past + time
    input_norm, q_norm, k_norm, post_norm = norms
    q_w, k_w, v_w, o_w, gate_w, up_w, down_w = weights
    q_b, k_b, v_b, o_b = biases
    normed = rms_norm_op(x, input_norm, eps)
    q = linear(normed, q_w, q_b).view(batch, time, num_heads, head_dim)
    k = linear(normed, k_w, k_b).view(batch, time, kv_heads, head_dim)
    q, k = qk_norm_rope_op(q, k, q_norm, k_norm, cos, sin, eps)
    k_cache[:, :, past:end] = k.transpose(1, 2)
    v_cache[:, :, past:end] = linear(normed, v_w, v_b).view(batch, time, kv_heads, head_dim).transpose(1, 2)
    keys, values = k_cache[:, :, :end].transpose(1, 2), v_cache[:, :, :end].transpose(1, 2)
    mask = None if mask is None else mask[..., :end]
    attended, _ = attention_op(q, keys, values, None, None, mask, mask is None, scale)
    normed, total = add_rms_norm_op(linear(attended.view(batch, time, -1), o_w, o_b), x, post_norm, eps)
    return total + linear(swiglu_op(linear(normed, gate_w), linear(normed, up_w)), down_w)


decoder_layer_op = register(
    "decoder_layer(Tensor x, Tensor[] norms, Tensor[] weights, Tensor?[] biases, Tensor cos, Tensor sin, Tensor(a!) k_cache,"
    " Tensor(b!) v_cache, int past, Tensor? mask, int num_heads, float eps, float scale) -> Tensor",
    cpu=_decoder_layer_cpu,
    fake=lambda x, *rest: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
