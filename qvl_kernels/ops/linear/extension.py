"""linear over the C++ kernel, for weights of any format."""

from typing import Any

import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.ops.linear.weights import extension_weight, out_features
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["extension_linear", "run_extension_linear"]


def extension_linear(
    x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    return run_extension_linear(x, extension_weight(weight, bias), out_features(weight))


def run_extension_linear(x: torch.Tensor, weight: Any, n: int) -> torch.Tensor:
    """``weight``: from ``extension_weight``, with ``n`` outputs."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    dispatch.extension().linear(
        rows.data_ptr(),
        weight,
        y.data_ptr(),
        rows.shape[0],
        n,
        rows.shape[1],
        rows.stride(0),
        n,
        DTYPE_CODES[x.dtype],
    )
    return y
