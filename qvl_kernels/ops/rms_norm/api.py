"""Public functions: add_rms_norm, rms_norm."""

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.rms_norm.op import add_rms_norm_op, rms_norm_op
from qvl_kernels.ops.rms_norm.reference import add_rms_norm_reference, rms_norm_reference

__all__ = ["add_rms_norm", "rms_norm"]


def _check(op: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> float:
    checks.check_tensor(op, "x", x)
    checks.check_tensor(op, "weight", weight, 1)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least 1 dimension, got a scalar")
    checks.check_shape(op, "weight", weight, (x.shape[-1],))
    if residual is not None:
        checks.check_shape(op, "residual", residual, tuple(x.shape))
    checks.check_same(op, x=x, residual=residual, weight=weight)
    checks.check_last_contiguous(op, x=x, residual=residual, weight=weight)
    return checks.check_eps(op, eps)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1e-6, offset: float = 0.0
) -> torch.Tensor:
    """y = x / sqrt(mean(x^2, -1) + eps) * (weight + offset)        [Zhang & Sennrich 2019, arXiv:1910.07467;
    Qwen3VLTextRMSNorm, with an offset of 1 Gemma3RMSNorm]

    Args:
        x: [..., C] fp32, bf16 or fp16; last dimension contiguous, other strides free.
        weight: [C], same dtype as x; None for ones.
        eps: added to the mean square (units of x squared).
        offset: added to the weight, in fp32.
    Returns:
        [..., C], dtype of x.
    Numerics: sums in fp32; rounded to x.dtype before the weight multiply, as transformers does. With an offset all of
        it is in fp32, over a copy of x, and rounded once, as transformers' Gemma does.
    Raises: TypeError or ValueError for dtype, device, shape or stride; RuntimeError if a forced backend cannot run
    here.
    Example:
        >>> y = qvl_kernels.rms_norm(torch.randn(2, 5, 64), torch.ones(64))
    """
    weight = checks.or_filled("rms_norm", x, weight, 1.0)
    offset = checks.check_number("rms_norm", "offset", offset, -checks.LARGEST, checks.LARGEST)
    eps = _check("rms_norm", x, None, weight, eps)
    if offset != 0.0:
        return rms_norm(x.float(), weight.float() + offset, eps=eps).to(x.dtype)
    if dispatch.choose("rms_norm", x.device, checks.unsupported_dtype(x)) == "reference":
        return rms_norm_reference(x, weight, eps)
    return call(rms_norm_op, x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm`` of x + residual, and the sum itself (rounded to x.dtype before the norm).

    Args:
        x, residual: [..., C] fp32, bf16 or fp16; last dimension contiguous.
        weight: [C], same dtype.
        eps: added to the mean square.
    Returns:
        (y, x + residual), both [..., C].
    Raises: as ``rms_norm``.
    Example:
        >>> y, hidden = qvl_kernels.add_rms_norm(torch.randn(3, 64), torch.randn(3, 64), torch.ones(64))
    """
    checks.check_tensor("add_rms_norm", "residual", residual)
    eps = _check("add_rms_norm", x, residual, weight, eps)
    if dispatch.choose("add_rms_norm", x.device, checks.unsupported_dtype(x)) == "reference":
        return add_rms_norm_reference(x, residual, weight, eps)
    return call(add_rms_norm_op, x, residual, weight, eps)
