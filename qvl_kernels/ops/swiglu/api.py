"""Public function: swiglu."""

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.swiglu.op import swiglu_op
from qvl_kernels.ops.swiglu.reference import swiglu_reference

__all__ = ["swiglu"]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """y = gate * sigmoid(gate) * up        [Shazeer 2020, arXiv:2002.05202; Qwen3VLTextMLP]

    Args:
        gate, up: [..., F] fp32, bf16 or fp16, same shape and dtype; last dimension contiguous.
    Returns:
        [..., F]; computed in fp32, rounded once.
    Raises: TypeError or ValueError for bad arguments; RuntimeError if a forced backend cannot run here.
    Example:
        >>> y = qvl_kernels.swiglu(torch.randn(3, 64), torch.randn(3, 64))
    """
    checks.check_tensor("swiglu", "gate", gate)
    checks.check_tensor("swiglu", "up", up)
    if gate.dim() < 1:
        raise ValueError("swiglu: gate must have at least 1 dimension, got a scalar")
    checks.check_shape("swiglu", "up", up, tuple(gate.shape))
    checks.check_same("swiglu", gate=gate, up=up)
    checks.check_last_contiguous("swiglu", gate=gate, up=up)
    if dispatch.choose("swiglu", gate.device, checks.unsupported_dtype(gate)) == "reference":
        return swiglu_reference(gate, up)
    return call(swiglu_op, gate, up)
