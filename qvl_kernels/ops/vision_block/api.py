"""Public names: VisionWeights, vision_block."""

from typing import Any, NamedTuple

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import needs_dispatcher
from qvl_kernels.ops.attention.api import check_cu_seqlens, unsupported_heads
from qvl_kernels.ops.linear.weights import placeholder, unsupported_scales
from qvl_kernels.ops.vision_block.cpu import quantized_vision_block
from qvl_kernels.ops.vision_block.op import vision_block_op
from qvl_kernels.ops.vision_block.reference import vision_block_reference
from qvl_kernels.ops.vision_block.unfused import unfused_vision_block
from qvl_kernels.quantization import QuantizedWeight, dequantize

__all__ = ["NO_BACKWARD", "VisionWeights", "vision_block"]


class VisionWeights(NamedTuple):
    """Weights of one vision block, as ``nn.Linear`` and the norms store them. C hidden size, F MLP width."""

    norm1_w: torch.Tensor  # [C]
    norm1_b: torch.Tensor
    qkv_w: torch.Tensor | QuantizedWeight  # [3 * C, C]
    qkv_b: torch.Tensor
    proj_w: torch.Tensor | QuantizedWeight  # [C, C]
    proj_b: torch.Tensor
    norm2_w: torch.Tensor  # [C]
    norm2_b: torch.Tensor
    fc1_w: torch.Tensor | QuantizedWeight  # [F, C]
    fc1_b: torch.Tensor
    fc2_w: torch.Tensor | QuantizedWeight  # [C, F]
    fc2_b: torch.Tensor


NO_BACKWARD = "has no backward; call it under torch.no_grad(), or compose the single ops to train"


def _check_weights(x: torch.Tensor, w: Any) -> None:
    for name, weight in zip(VisionWeights._fields, w):
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"vision_block: {name} must be a torch.Tensor, got {type(weight).__name__}")
    hidden, mlp = x.shape[1], w.fc1_w.shape[:1].numel()  # its number of dimensions is checked below
    expected = (
        (hidden,),
        (hidden,),
        (3 * hidden, hidden),
        (3 * hidden,),
        (hidden, hidden),
        (hidden,),
        (hidden,),
        (hidden,),
        (mlp, hidden),
        (mlp,),
        (hidden, mlp),
        (hidden,),
    )
    for name, weight, shape in zip(VisionWeights._fields, w, expected):
        if weight.shape != shape:
            raise ValueError(f"vision_block: {name} must have shape {shape}, got {tuple(weight.shape)}")
        if weight.dtype is not x.dtype or weight.device != x.device:
            raise TypeError(
                f"vision_block: {name} is {weight.dtype} on {weight.device}, x is {x.dtype} on {x.device}; both "
                f"must agree"
            )
        checks.check_memory("vision_block", name, weight)


def vision_block(
    x: torch.Tensor,
    weights: VisionWeights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    num_heads: int,
    eps: float = 1e-6,
) -> torch.Tensor:
    """A fused vision block over several images (varlen) in one call. Inference only.

    h = x + proj(attention(rope(q), rope(k), v)) with q, k, v = qkv(layer_norm(x)), then
    y = h + fc2(gelu_tanh(fc1(layer_norm(h))))        [Qwen3VLVisionBlock]

    Args:
        x: [N, C] contiguous, fp32, bf16 or fp16: the patches of all images, one after the other.
        weights: VisionWeights, dtype of x; any of the matrices may be a ``quant.QuantizedWeight`` instead.
        cos, sin: fp32 [N, D], D = C / num_heads, even.
        cu_seqlens: int32 [images + 1] on the CPU, prefix sum of patches; patches attend to their own image only.
        num_heads: heads; C must be a multiple.
        eps: of both norms.
    Returns:
        [N, C].
    Raises: TypeError or ValueError for bad arguments; RuntimeError under gradients or if a forced backend cannot run
    here.
    Example:
        >>> y = qvl_kernels.vision_block(x, weights, cos, sin, torch.tensor([0, 784], dtype=torch.int32), num_heads=16)
    """
    op = "vision_block"
    checks.check_tensor(op, "x", x, 2)
    if not x.is_contiguous():
        raise ValueError(f"{op}: x must be contiguous [N, C], got strides {x.stride()}")
    tokens, hidden = x.shape
    num_heads = checks.check_int(op, "num_heads", num_heads, 1)
    if hidden < 1 or hidden % num_heads or hidden // num_heads % 2:
        raise ValueError(f"{op}: hidden size {hidden} must be num_heads {num_heads} times an even head_dim")
    head_dim = hidden // num_heads
    if not isinstance(weights, VisionWeights):
        raise TypeError(
            f"{op}: weights must be VisionWeights, got {type(weights).__name__}; give VisionWeights(*weights)"
        )
    w = VisionWeights._make(placeholder(op, weight, x) for weight in weights)
    _check_weights(x, w)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.check_tensor(op, name, table, 2)
        checks.check_shape(op, name, table, (tokens, head_dim))
        checks.check_dtype(op, name, table, torch.float32, *((torch.float64,) if x.dtype is torch.float64 else ()))
        checks.check_device(op, name, table, x.device)
    checks.check_last_contiguous(op, cos=cos, sin=sin)
    check_cu_seqlens(op, cu_seqlens, tokens, x.device)
    eps = checks.check_eps(op, eps)
    checks.check_no_gradient(
        op, NO_BACKWARD, x, cos, sin, *w, *(weight.scales for weight in weights if isinstance(weight, QuantizedWeight))
    )
    quantized = any(isinstance(weight, QuantizedWeight) for weight in weights)
    w = weights
    backend = dispatch.choose(op, x.device, unsupported_scales(*weights) or unsupported_heads(x, head_dim))
    if backend == "reference":
        if quantized:
            w = VisionWeights._make(
                dequantize(weight, x.dtype) if isinstance(weight, QuantizedWeight) else weight for weight in w
            )
        return vision_block_reference(x, w, cos, sin, cu_seqlens, num_heads, eps)
    function = quantized_vision_block if quantized else vision_block_op
    if backend == "triton" and not needs_dispatcher():
        # The dispatcher takes the host longer than the device takes for small kernels.
        function = unfused_vision_block
    return function(
        x,
        [w.norm1_w, w.norm1_b, w.norm2_w, w.norm2_b],
        [w.qkv_w, w.proj_w, w.fc1_w, w.fc2_w],
        [w.qkv_b, w.proj_b, w.fc1_b, w.fc2_b],
        cos,
        sin,
        cu_seqlens,
        num_heads,
        eps,
    )
