"""Public functions: add_layer_norm, layer_norm."""

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.layer_norm.op import add_layer_norm_op, layer_norm_op
from qvl_kernels.ops.layer_norm.reference import add_layer_norm_reference, layer_norm_reference

__all__ = ["add_layer_norm", "layer_norm"]


def _check(
    op: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> float:
    checks.check_tensor(op, "x", x)
    checks.check_tensor(op, "weight", weight, 1)
    checks.check_tensor(op, "bias", bias, 1)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least 1 dimension, got a scalar")
    checks.check_shape(op, "weight", weight, (x.shape[-1],))
    checks.check_shape(op, "bias", bias, (x.shape[-1],))
    if residual is not None:
        checks.check_shape(op, "residual", residual, tuple(x.shape))
    checks.check_same(op, x=x, residual=residual, weight=weight, bias=bias)
    checks.check_last_contiguous(op, x=x, residual=residual, weight=weight, bias=bias)
    return checks.check_eps(op, eps)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, *, eps: float = 1e-6
) -> torch.Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        [Ba et al. 2016, arXiv:1607.06450;
    torch.nn.LayerNorm]

    Args:
        x: [..., C] fp32, bf16 or fp16; last dimension contiguous, other strides free.
        weight, bias: [C], same dtype as x; None for ones and zeros.
        eps: added to the variance.
    Returns:
        [..., C], dtype of x; computed in fp32, rounded once.
    Raises: TypeError or ValueError for dtype, device, shape or stride; RuntimeError if a forced backend cannot run
    here.
    Example:
        >>> y = qvl_kernels.layer_norm(torch.randn(2, 64), torch.ones(64), torch.zeros(64))
    """
    weight = checks.or_filled("layer_norm", x, weight, 1.0)
    bias = checks.or_filled("layer_norm", x, bias, 0.0)
    eps = _check("layer_norm", x, None, weight, bias, eps)
    if dispatch.choose("layer_norm", x.device, checks.unsupported_dtype(x)) == "reference":
        return layer_norm_reference(x, weight, bias, eps)
    return call(layer_norm_op, x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """``layer_norm`` of x + residual, and the sum itself (rounded to x.dtype before the norm).

    Args:
        x, residual: [..., C] fp32, bf16 or fp16; last dimension contiguous.
        weight, bias: [C], same dtype.
        eps: added to the variance.
    Returns:
        (y, x + residual), both [..., C].
    Raises: as ``layer_norm``.
    Example:
        >>> y, hidden = qvl_kernels.add_layer_norm(torch.randn(3, 64), torch.randn(3, 64), torch.ones(64),
        torch.zeros(64))
    """
    checks.check_tensor("add_layer_norm", "residual", residual)
    eps = _check("add_layer_norm", x, residual, weight, bias, eps)
    if dispatch.choose("add_layer_norm", x.device, checks.unsupported_dtype(x)) == "reference":
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    return call(add_layer_norm_op, x, residual, weight, bias, eps)
