"""Public function: gelu_tanh."""

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.gelu_tanh.op import gelu_tanh_op
from qvl_kernels.ops.gelu_tanh.reference import gelu_tanh_reference

__all__ = ["gelu_tanh"]


def gelu_tanh(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = 0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))), z = x + bias        [Hendrycks & Gimpel, arXiv:1606.08415]

    Args:
        x: [..., F] fp32, bf16 or fp16; last dimension contiguous.
        bias: [F], same dtype, or None.
    Returns:
        [..., F]; computed in fp32, rounded once.
    Raises: TypeError or ValueError for bad arguments; RuntimeError if a forced backend cannot run here.
    Example:
        >>> y = qvl_kernels.gelu_tanh(torch.randn(3, 64))
    """
    checks.check_tensor("gelu_tanh", "x", x)
    if x.dim() < 1:
        raise ValueError("gelu_tanh: x must have at least 1 dimension, got a scalar")
    if bias is not None:
        checks.check_tensor("gelu_tanh", "bias", bias, 1)
        checks.check_shape("gelu_tanh", "bias", bias, (x.shape[-1],))
    checks.check_same("gelu_tanh", x=x, bias=bias)
    checks.check_last_contiguous("gelu_tanh", x=x, bias=bias)
    if dispatch.choose("gelu_tanh", x.device, checks.unsupported_dtype(x)) == "reference":
        return gelu_tanh_reference(x, bias)
    return call(gelu_tanh_op, x, bias)
