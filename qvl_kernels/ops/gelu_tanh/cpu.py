import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.library import register

__all__ = ["gelu_tanh_op"]


def _gelu_tanh_cpu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    y = torch.empty(x.shape, dtype=x.dtype)
    dispatch.extension().gelu_tanh(
        x=rows.data_ptr(), bias=0 if bias is None else bias.data_ptr(), y=y.data_ptr(), rows=rows.shape[0], size=size,
        x_stride=rows.stride(0), y_stride=size, dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return y


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, bias = ctx.saved_tensors
    wide = x.float() if bias is None else x.float() + bias.float()
    dx = torch.ops.aten.gelu_backward(grad.float(), wide, approximate="tanh")
    db = None if bias is None else dx.reshape(-1, x.shape[-1]).sum(0).to(bias.dtype)
    return dx.to(x.dtype), db


gelu_tanh_op = register(
    "gelu_tanh(Tensor x, Tensor? bias) -> Tensor",
    cpu=_gelu_tanh_cpu,
    fake=lambda x, bias: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    backward=_backward,
    setup_context=_setup,
)
