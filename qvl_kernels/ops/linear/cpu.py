import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.library import register
from qvl_kernels.ops.linear.onednn import use_onednn

__all__ = ["extension_linear", "linear_op"]


def _linear_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if use_onednn(x, x.numel() // max(1, x.shape[-1])):
        return torch.nn.functional.linear(x, weight, bias)
    return extension_linear(x, weight, bias)


def extension_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    n = weight.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    dispatch.extension().linear(
        x=rows.data_ptr(), w=weight.data_ptr(), bias=0 if bias is None else bias.data_ptr(), y=y.data_ptr(),
        rows=rows.shape[0], n=n, k=rows.shape[1], x_stride=rows.stride(0), w_stride=weight.stride(0), y_stride=n,
        dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return y


def _setup(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    dx = dw = db = None
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        dx = grad @ weight
    if ctx.needs_input_grad[1]:
        dw = rows.t() @ x.reshape(-1, x.shape[-1])
    if ctx.has_bias and ctx.needs_input_grad[2]:
        db = rows.sum(0)
    return dx, dw, db


linear_op = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cpu=_linear_cpu,
    fake=lambda x, weight, bias: torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device),
    backward=_backward,
    setup_context=_setup,
)
