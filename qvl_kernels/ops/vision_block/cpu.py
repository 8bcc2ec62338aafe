"""vision_block on the CPU: one C++ call, or the unfused block where PyTorch's kernels are faster."""

from collections.abc import Sequence

import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.library import is_eligible
from qvl_kernels.ops.attention import selection as attention_selection
from qvl_kernels.ops.linear import selection as linear_selection
from qvl_kernels.ops.linear.weights import extension_weight, out_features, tensors_of
from qvl_kernels.ops.vision_block.unfused import unfused_vision_block
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["quantized_vision_block", "vision_block_cpu"]


def vision_block_cpu(
    x: torch.Tensor,
    norms: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    if _prefers_pytorch(x, weights, cu_seqlens, num_heads):
        return unfused_vision_block(x, norms, weights, biases, cos, sin, cu_seqlens, num_heads, eps)
    return _extension_vision_block(x, norms, weights, biases, cos, sin, cu_seqlens, num_heads, eps)


def quantized_vision_block(
    x: torch.Tensor,
    norms: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | QuantizedWeight],
    biases: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    """As ``vision_block_op``; any weight may be a QuantizedWeight, which a torch op cannot take."""
    eligible = (
        x.is_cpu
        and dispatch.forced() != "triton"
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )
    eligible = eligible and all(
        is_eligible(part, "cpu")
        for weight in (x, *norms, *weights, *biases, cos, sin, cu_seqlens)
        for part in tensors_of(weight)
    )
    eligible = eligible and not _prefers_pytorch(x, weights, cu_seqlens, num_heads)
    function = _extension_vision_block if eligible else unfused_vision_block
    return function(x, norms, weights, biases, cos, sin, cu_seqlens, num_heads, eps)


def _prefers_pytorch(
    x: torch.Tensor, weights: Sequence[torch.Tensor | QuantizedWeight], cu_seqlens: torch.Tensor, num_heads: int
) -> bool:
    """Whether PyTorch's linear or attention is faster in the block."""
    tokens, hidden = x.shape
    attends = attention_selection.use_pytorch(
        x.dtype, tokens, tokens, hidden // num_heads, causal=False, sequences=cu_seqlens.numel() - 1
    )
    return attends or linear_selection.use_pytorch(x.dtype, tokens, *weights)


def _extension_vision_block(
    x: torch.Tensor,
    norms: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | QuantizedWeight],
    biases: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    """The block in one C++ call; any weight may be a QuantizedWeight."""
    tokens, hidden = x.shape
    head_dim = out_features(weights[0]) // (3 * num_heads)
    out = torch.empty(x.shape, dtype=x.dtype)
    dispatch.extension().vision_block(
        x=x.data_ptr(),
        out=out.data_ptr(),
        norms=[norm.data_ptr() for norm in norms],
        weights=[extension_weight(w, b) for w, b in zip(weights, biases)],
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        cos_stride=cos.stride(0),
        sin_stride=sin.stride(0),
        cu_seqlens=cu_seqlens.data_ptr(),
        sequences=cu_seqlens.numel() - 1,
        tokens=tokens,
        hidden=hidden,
        heads=num_heads,
        head_dim=head_dim,
        mlp=out_features(weights[2]),
        eps=eps,
        scale=head_dim**-0.5,
        dtype=DTYPE_CODES[x.dtype],
    )
    return out
