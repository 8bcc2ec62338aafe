"""torch ops qvl::gemv and qvl::gemv_swiglu, and both over quantised weights; inference only.

x is [..., K], weights are [N, K].
"""

from typing import Any

import torch

from qvl_kernels.library import register
from qvl_kernels.ops.gemv import reference

__all__ = ["gemv_op", "gemv_swiglu_op", "quantized_gemv_op", "quantized_gemv_swiglu_op"]


def _fake(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _launch_gemv(*args: Any) -> Any:
    from qvl_kernels.ops.gemv.launch import launch_gemv

    return launch_gemv(*args)


def _launch_gemv_swiglu(*args: Any) -> Any:
    from qvl_kernels.ops.gemv.launch import launch_gemv_swiglu

    return launch_gemv_swiglu(*args)


def _launch_quantized_gemv(*args: Any) -> Any:
    from qvl_kernels.ops.gemv.launch import launch_quantized_gemv

    return launch_quantized_gemv(*args)


def _launch_quantized_gemv_swiglu(*args: Any) -> Any:
    from qvl_kernels.ops.gemv.launch import launch_quantized_gemv_swiglu

    return launch_quantized_gemv_swiglu(*args)


gemv_op = register(
    "gemv(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, float eps, Tensor? residual) -> Tensor",
    cpu=reference.gemv_reference,
    triton=_launch_gemv,
    fake=_fake,
)

gemv_swiglu_op = register(
    "gemv_swiglu(Tensor x, Tensor gate, Tensor up, Tensor? norm_weight, float eps) -> Tensor",
    cpu=reference.gemv_swiglu_reference,
    triton=_launch_gemv_swiglu,
    fake=_fake,
)

quantized_gemv_op = register(
    "quantized_gemv(Tensor x, Tensor values, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? norm_weight, "
    "float eps, Tensor? residual) -> Tensor",
    cpu=reference.quantized_gemv_reference,
    triton=_launch_quantized_gemv,
    fake=_fake,
)

quantized_gemv_swiglu_op = register(
    "quantized_gemv_swiglu(Tensor x, Tensor gate_values, Tensor gate_scales, Tensor? gate_zeros, Tensor up_values, "
    "Tensor up_scales, Tensor? up_zeros, Tensor? norm_weight, float eps) -> Tensor",
    cpu=reference.quantized_gemv_swiglu_reference,
    triton=_launch_quantized_gemv_swiglu,
    fake=_fake,
)
