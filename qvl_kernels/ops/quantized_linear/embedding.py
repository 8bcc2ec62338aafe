"""Lookup in a quantised embedding: one call of the extension on the CPU, else PyTorch operations."""

import torch

from qvl_kernels import dispatch, quantization
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.library import is_eligible, needs_dispatcher
from qvl_kernels.ops.linear.weights import extension_weight, out_features, tensors_of, unsupported_scales
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["embedding_rows"]


def embedding_rows(quantized: QuantizedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantised rows of a weight [N, K], as of ``quant.dequantize``.

    Args:
        ids: int64 or int32 [n].
        dtype: of the rows, floating-point.
    Returns:
        [n, K].
    Raises: TypeError or ValueError for a weight that is not well-formed; on the CPU IndexError for an id outside of
    [0, N).
    Example:
        >>> weight = quantization.quantize(torch.randn(10, 64), bits=4)
        >>> rows = embedding_rows(weight, torch.tensor([3, 7]), torch.float32)
    """
    quantization.check_weight("embedding_rows", quantized, ids.device)
    if not _extension_takes(quantized, ids, dtype):
        return quantization.dequantize(quantized.apply(lambda x: x.index_select(0, ids)), dtype)
    y = torch.empty((ids.numel(), quantized.in_features), dtype=dtype, device=ids.device)
    dispatch.extension().quantized_embedding(
        ids.data_ptr(),
        extension_weight(quantized, None),
        y.data_ptr(),
        ids.numel(),
        out_features(quantized),
        quantized.in_features,
        DTYPE_CODES[dtype],
    )
    return y


def _extension_takes(quantized: QuantizedWeight, ids: torch.Tensor, dtype: torch.dtype) -> bool:
    return (
        ids.is_cpu
        and ids.dtype is torch.int64
        and ids.is_contiguous()
        and dtype in DTYPE_CODES
        and not needs_dispatcher()
        and not torch._C._len_torch_function_stack()
        and dispatch.forced() in (None, "cpp")
        and unsupported_scales(quantized) is None
        and all(is_eligible(x, "cpu") for x in (ids, *tensors_of(quantized)))
    )
