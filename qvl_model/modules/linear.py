"""nn.Linear and nn.LayerNorm through the kernels."""

from torch import Tensor, nn

import qvl_kernels
from qvl_kernels.ops.gemv.tiles import is_small_m
from qvl_model.modules.fast_path import autocast_dtype, is_number, kernels_take

__all__ = ["LayerNorm", "Linear"]


class Linear(nn.Linear):
    """``nn.Linear`` through ``qvl_kernels.linear``: the dense weight is used as it is in memory."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda and not is_small_m(
            input
        ):  # PyTorch's GEMM is the kernel here; our checks would cost the host time 196 times in a training step
            return super().forward(input)
        if kernels_take(input, self.weight, self.bias):
            return qvl_kernels.linear(input, self.weight, self.bias)
        return super().forward(input)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension through ``qvl_kernels.layer_norm``."""

    def forward(self, input: Tensor) -> Tensor:
        eligible = (
            len(self.normalized_shape) == 1 and self.bias is not None and autocast_dtype(input.device) is None
        )  # autocast asks for fp32
        if eligible and is_number(self.eps) and kernels_take(input, self.weight, self.bias):
            return qvl_kernels.layer_norm(input, self.weight, self.bias, eps=self.eps)
        return super().forward(input)
