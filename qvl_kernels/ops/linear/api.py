"""Public function: linear."""

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.gemv.tiles import is_small_m
from qvl_kernels.ops.linear.op import linear_op
from qvl_kernels.ops.linear.reference import linear_reference

__all__ = ["linear"]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x @ weight.T + bias        [torch.nn.functional.linear]

    Args:
        x: [..., K] fp32, bf16 or fp16; last dimension contiguous.
        weight: [N, K] as stored by ``nn.Linear``, same dtype as x; rows may be strided, nothing is copied.
        bias: [N] or None.
    Returns:
        [..., N], dtype of x.
    Numerics: products and sums in fp32 (bf16 pairs may use the CPU's bf16 dot instruction), one rounding.
    Raises: TypeError or ValueError for dtype, device, shape or stride; RuntimeError if a forced backend cannot run
    here.
    Example:
        >>> y = qvl_kernels.linear(torch.randn(3, 64), torch.randn(10, 64))
    """
    checks.check_tensor("linear", "x", x)
    checks.check_tensor("linear", "weight", weight, 2)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: the last dimension of x must equal weight's second, got x {tuple(x.shape)} and weight "
            f"{tuple(weight.shape)}"
        )
    if bias is not None:
        checks.check_tensor("linear", "bias", bias, 1)
        checks.check_shape("linear", "bias", bias, (weight.shape[0],))
    checks.check_same("linear", x=x, weight=weight, bias=bias)
    checks.check_last_contiguous("linear", x=x, weight=weight, bias=bias)
    backend = dispatch.choose("linear", x.device, checks.unsupported_dtype(x))
    if backend == "reference" or backend == "triton" and not is_small_m(x):  # large M: PyTorch's GEMM and its backward
        return linear_reference(x, weight, bias)
    return call(linear_op, x, weight, bias)
