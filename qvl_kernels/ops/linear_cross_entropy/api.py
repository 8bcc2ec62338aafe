"""Public function: linear_cross_entropy."""

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.ops.linear_cross_entropy.op import loss_rows_op, loss_sum_op
from qvl_kernels.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy"]


def _check_labels(labels: torch.Tensor, device: torch.device, tokens: int, vocabulary: int, ignore_index: int) -> None:
    checks.check_dtype("linear_cross_entropy", "labels", labels, torch.int64)
    checks.check_shape("linear_cross_entropy", "labels", labels, (tokens,))
    checks.check_device("linear_cross_entropy", "labels", labels, device)
    if torch.compiler.is_compiling() or labels.device.type != "cpu":
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if bool(bad.any()):
        raise ValueError(
            f"linear_cross_entropy: labels must lie in [0, {vocabulary}) or equal ignore_index {ignore_index}, "
            f"got {int(labels[bad][0])}"
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """cross_entropy(hidden @ weight.T, labels) without materialising the logits        [arXiv:2411.09009]

    Args:
        hidden: [M, C] fp32, bf16 or fp16. weight: [V, C], same dtype.
        labels: int64 [M]; tokens labelled ignore_index do not count.
        label_smoothing: weight of the uniform distribution in the target, in [0, 1).
        reduction: "mean" (over counted tokens), "sum" or "none".
    Returns:
        fp32 scalar, or [M] for "none". Logits are rounded to hidden's dtype, as the language-model head would; the rest
        is fp32. A second derivative (``create_graph=True``) does materialise the logits.
    Raises: TypeError or ValueError for bad arguments; RuntimeError if a forced backend cannot run here.
    Example:
        >>> loss = qvl_kernels.linear_cross_entropy(torch.randn(5, 64), torch.randn(100, 64), torch.randint(0, 100,
        (5,)))
    """
    op = "linear_cross_entropy"
    checks.check_tensor(op, "hidden", hidden, 2)
    checks.check_tensor(op, "weight", weight, 2)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden and weight must have the same width, got {hidden.shape[1]} and {weight.shape[1]}"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"{op}: weight must have at least 1 row, one per word, got shape {tuple(weight.shape)}")
    checks.check_same(op, hidden=hidden, weight=weight)
    checks.check_last_contiguous(op, hidden=hidden, weight=weight)
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        error = ValueError if isinstance(reduction, str) else TypeError
        raise error(f'{op}: reduction must be "mean", "sum" or "none", got {reduction!r}')
    label_smoothing = checks.check_probability(op, "label_smoothing", label_smoothing)
    ignore_index = checks.check_int(op, "ignore_index", ignore_index, -(2**63))
    _check_labels(labels, hidden.device, hidden.shape[0], weight.shape[0], ignore_index)
    backend = dispatch.choose(op, hidden.device, checks.unsupported_dtype(hidden))
    if backend == "reference":
        return linear_cross_entropy_reference(hidden, weight, labels, ignore_index, label_smoothing, reduction)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    # fp16 gradients must be computed at the scale of the loss, which only the backward knows: without it small ones
    # underflow.
    if backend == "triton" and any(wanted) and reduction != "none" and hidden.dtype != torch.float16:
        total, _, _ = loss_sum_op(hidden, weight, labels, ignore_index, label_smoothing, *wanted)
    else:
        losses, _ = loss_rows_op(hidden, weight, labels, ignore_index, label_smoothing)
        if reduction == "none":
            return losses
        total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()
