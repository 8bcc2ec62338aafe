import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.library import register

__all__ = ["add_rms_norm_op", "rms_norm_backward", "rms_norm_op"]


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows = _rows(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    dispatch.extension().norm(
        x=rows.data_ptr(), residual=0, weight=weight.data_ptr(), bias=0, y=y.data_ptr(), sum=0,
        rows=rows.shape[0], size=rows.shape[1], x_stride=rows.stride(0), residual_stride=0,
        y_stride=rows.shape[1], sum_stride=0, eps=eps, dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return y


def _add_rms_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x_rows, residual_rows = _rows(x), _rows(residual)
    y, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    dispatch.extension().norm(
        x=x_rows.data_ptr(), residual=residual_rows.data_ptr(), weight=weight.data_ptr(), bias=0, y=y.data_ptr(),
        sum=total.data_ptr(), rows=x_rows.shape[0], size=x_rows.shape[1], x_stride=x_rows.stride(0),
        residual_stride=residual_rows.stride(0), y_stride=x_rows.shape[1], sum_stride=x_rows.shape[1], eps=eps,
        dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return y, total


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """With n = x r, r = rsqrt(mean(x^2) + eps) and g = grad * weight: dx = r (g - n mean(g n)), dw = sum(grad n)."""
    wide, g = x.float(), grad.float()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    n = wide * r
    gw = g * weight.float()
    dx = r * (gw - n * (gw * n).mean(-1, keepdim=True))
    dw = (g * n).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dw.to(weight.dtype)


def _setup(ctx, inputs, output) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    dx, dw = rms_norm_backward(grad, x, weight, ctx.eps)
    return dx, dw, None


def _add_setup(ctx, inputs, output) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _add_backward(ctx, grad_y, grad_total):
    total, weight = ctx.saved_tensors
    dx, dw = rms_norm_backward(grad_y, total, weight, ctx.eps)
    dx = dx + grad_total
    return dx, dx, dw, None


rms_norm_op = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    cpu=_rms_norm_cpu,
    fake=lambda x, weight, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    backward=_backward,
    setup_context=_setup,
)
add_rms_norm_op = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    cpu=_add_rms_norm_cpu,
    fake=lambda x, residual, weight, eps: (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
    ),
    backward=_add_backward,
    setup_context=_add_setup,
)
