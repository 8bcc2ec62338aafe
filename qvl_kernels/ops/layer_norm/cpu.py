import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.library import register

__all__ = ["add_layer_norm_op", "layer_norm_op"]


def _norm(x, residual, weight, bias, eps):
    rows = x.reshape(-1, x.shape[-1])
    residual_rows = None if residual is None else residual.reshape(-1, x.shape[-1])
    y = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    dispatch.extension().norm(
        x=rows.data_ptr(), residual=0 if residual is None else residual_rows.data_ptr(), weight=weight.data_ptr(),
        bias=bias.data_ptr(), y=y.data_ptr(), sum=0 if total is None else total.data_ptr(), rows=rows.shape[0],
        size=rows.shape[1], x_stride=rows.stride(0), residual_stride=0 if residual is None else residual_rows.stride(0),
        y_stride=rows.shape[1], sum_stride=rows.shape[1], eps=eps, dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return y, total


def _layer_norm_backward(grad, x, weight, eps):
    """With n = (x - mean) r and g = grad * weight: dx = r (g - mean(g) - n mean(g n)), dw = sum(grad n), db = sum(grad)."""
    wide, g = x.float(), grad.float()
    centred = wide - wide.mean(-1, keepdim=True)
    r = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    n = centred * r
    gw = g * weight.float()
    dx = r * (gw - gw.mean(-1, keepdim=True) - n * (gw * n).mean(-1, keepdim=True))
    dw = (g * n).reshape(-1, x.shape[-1]).sum(0)
    db = g.reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dw.to(weight.dtype), db.to(weight.dtype)


def _setup(ctx, inputs, output) -> None:
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    return *_layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


def _add_setup(ctx, inputs, output) -> None:
    _, _, weight, _, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _add_backward(ctx, grad_y, grad_total):
    dx, dw, db = _layer_norm_backward(grad_y, *ctx.saved_tensors, ctx.eps)
    dx = dx + grad_total
    return dx, dx, dw, db, None


def _like(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


layer_norm_op = register(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    cpu=lambda x, weight, bias, eps: _norm(x, None, weight, bias, eps)[0],
    fake=lambda x, weight, bias, eps: _like(x),
    backward=_backward,
    setup_context=_setup,
)
add_layer_norm_op = register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    cpu=_norm,
    fake=lambda x, residual, weight, bias, eps: (_like(x), _like(x)),
    backward=_add_backward,
    setup_context=_add_setup,
)
