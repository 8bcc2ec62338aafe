"""torch ops of linear_cross_entropy: per-token losses with a backward, and their sum together with its gradients.

sums [2, M]: the softmax state m_i (largest logit of a token) and log(l_i), l_i = sum of exp(logit - m_i). They are two
numbers because the lse m_i + log(l_i) would lose the digits of log(l_i) beside a large m_i.
"""

from typing import Any

import torch

from qvl_kernels.library import call, differentiable_gradients, register
from qvl_kernels.ops.linear_cross_entropy.cpu import loss_rows_backward_cpu, loss_rows_cpu, loss_sum_cpu
from qvl_kernels.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["loss_rows_op", "loss_sum_op"]


def _gradients(
    hidden: torch.Tensor, weight: torch.Tensor, hidden_wanted: bool, weight_wanted: bool
) -> tuple[torch.Tensor, ...]:
    """Uninitialised gradients of hidden and weight; of size 0 where not wanted."""
    return tuple(
        torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
        for x, wanted in ((hidden, hidden_wanted), (weight, weight_wanted))
    )


def _rows_fake(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    options: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
    return torch.empty((hidden.shape[0],), **options), torch.empty((2, hidden.shape[0]), **options)


def _rows_backward_fake(
    grad: torch.Tensor,
    sums: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, ...]:
    return _gradients(hidden, weight, hidden_wanted, weight_wanted)


def _sum_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, ...]:
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    return loss, *_gradients(hidden, weight, hidden_wanted, weight_wanted)


def _rows_setup(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden, weight, labels, ctx.ignore_index, ctx.label_smoothing = inputs
    ctx.save_for_backward(output[1], hidden, weight, labels)
    ctx.mark_non_differentiable(output[1])


def _rows_backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    gradients = call(loss_rows_backward_op, grad, *ctx.saved_tensors, ctx.ignore_index, ctx.label_smoothing, *wanted)
    return *(x if needed else None for x, needed in zip(gradients, wanted)), None, None, None


def _rows_double_backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Backward over the whole logits, which a second derivative needs."""
    _, hidden, weight, labels = ctx.saved_tensors
    return *_double_backward_gradients(ctx, hidden, weight, labels, "none", grad), None, None, None


def _double_backward_gradients(
    ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, reduction: str, grad: torch.Tensor
) -> list[torch.Tensor | None]:
    def function(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy_reference(hidden, weight, labels, ctx.ignore_index, ctx.label_smoothing, reduction)

    return differentiable_gradients(function, (hidden, weight), (grad,))


def _sum_setup(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.ignore_index, ctx.label_smoothing = inputs[3:5]
    ctx.mark_non_differentiable(*output[1:])


def _sum_backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    _, _, labels, *unscaled = ctx.saved_tensors
    # If every label is ignored the mean is 0 / 0 and grad is infinite; the gradient is 0, as in PyTorch.
    factor = torch.where((labels != ctx.ignore_index).any(), grad, 0.0)
    gradients = (_scaled(x, factor) if needed else None for x, needed in zip(unscaled, ctx.needs_input_grad))
    return *gradients, None, None, None, None, None


def _sum_double_backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, labels = ctx.saved_tensors[:3]
    return *_double_backward_gradients(ctx, hidden, weight, labels, "sum", grad), None, None, None, None, None


def _scaled(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x [A, B] * factor in fp32; ``factor`` is a tensor, as a scalar would first be rounded to x's dtype.

    In place unless x is needed again, by a tracer or by another backward over a retained graph: dweight is the largest
    tensor of a training step.
    """
    in_place = type(x) is torch.Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    return torch.mul(x, factor.reshape(1, 1), out=x if in_place else torch.empty_like(x))


def _launch_loss_rows_backward(*args: Any) -> Any:
    from qvl_kernels.ops.linear_cross_entropy.triton_linear_cross_entropy import launch_loss_rows_backward

    return launch_loss_rows_backward(*args)


def _launch_loss_rows(*args: Any) -> Any:
    from qvl_kernels.ops.linear_cross_entropy.triton_linear_cross_entropy import launch_loss_rows

    return launch_loss_rows(*args)


def _launch_loss_sum(*args: Any) -> Any:
    from qvl_kernels.ops.linear_cross_entropy.triton_linear_cross_entropy import launch_loss_sum

    return launch_loss_sum(*args)


loss_rows_backward_op = register(
    "linear_cross_entropy_backward(Tensor grad, Tensor sums, Tensor hidden, Tensor weight, Tensor labels, int "
    "ignore_index,"
    " float label_smoothing, bool hidden_wanted, bool weight_wanted) -> (Tensor, Tensor)",
    cpu=loss_rows_backward_cpu,
    triton=_launch_loss_rows_backward,
    fake=_rows_backward_fake,
)

loss_rows_op = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, float label_smoothing) -> "
    "(Tensor, Tensor)",
    cpu=loss_rows_cpu,
    triton=_launch_loss_rows,
    fake=_rows_fake,
    backward=_rows_backward,
    double_backward=_rows_double_backward,
    setup_context=_rows_setup,
)

loss_sum_op = register(
    "linear_cross_entropy_sum(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, float label_smoothing, "
    "bool hidden_wanted,"
    " bool weight_wanted) -> (Tensor, Tensor, Tensor)",
    cpu=loss_sum_cpu,
    triton=_launch_loss_sum,
    fake=_sum_fake,
    backward=_sum_backward,
    double_backward=_sum_double_backward,
    setup_context=_sum_setup,
)
