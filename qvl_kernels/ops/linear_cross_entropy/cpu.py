"""Per-token losses from chunks of logits; the backward recomputes the logits, one slice of the vocabulary at a time.

[Cut Your Losses, Wijmans et al. 2024, arXiv:2411.09009: the [M, V] logits are never materialised.]
"""

import torch

from qvl_kernels.ops.linear.op import linear_op

__all__ = ["loss_rows_backward_cpu", "loss_rows_cpu", "loss_sum_cpu"]

CHUNK_LOGITS = 1 << 24  # logits in memory at once (64 MB of fp32)


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear_op(hidden, weight, None).float()


def loss_rows_cpu(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    losses, sums = torch.empty(tokens, dtype=torch.float32), torch.empty((2, tokens), dtype=torch.float32)
    rows = max(1, CHUNK_LOGITS // max(1, vocabulary))
    for begin in range(0, tokens, rows):
        part = slice(begin, begin + rows)
        logits = _logits(hidden[part], weight)
        ignored = labels[part] == ignore_index
        target = labels[part].masked_fill(ignored, 0)[:, None]
        row_max = logits.amax(-1)
        loss = (row_max - logits.gather(1, target)[:, 0]) * (1.0 - label_smoothing)
        if label_smoothing > 0.0:
            loss += (row_max - logits.mean(-1)) * label_smoothing
        log_sum = logits.sub_(row_max[:, None]).exp_().sum(-1).log_()
        losses[part] = loss.add_(log_sum).masked_fill_(ignored, 0.0)
        sums[0, part], sums[1, part] = row_max, log_sum
    return losses, sums


def loss_rows_backward_cpu(
    grad: torch.Tensor,
    sums: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dhidden, dweight): every row of dweight is written once, and dhidden is summed in fp32."""
    vocabulary = weight.shape[0]
    counted = (labels != ignore_index)[:, None]
    scale = torch.where(counted, grad[:, None], 0.0)
    target = labels[:, None].masked_fill(~counted, 0)
    dhidden = torch.zeros(hidden.shape, dtype=torch.float32) if hidden_wanted else None
    dweight = torch.empty(weight.shape if weight_wanted else (0,), dtype=weight.dtype)
    columns = max(1, CHUNK_LOGITS // max(1, hidden.shape[0]))
    for begin in range(0, vocabulary, columns):
        rows = weight[begin : begin + columns]
        dlogits = _logits(hidden, rows).sub_(sums[0, :, None]).sub_(sums[1, :, None]).exp_().mul_(scale)
        if label_smoothing > 0.0:
            dlogits.sub_(scale * (label_smoothing / vocabulary))
        inside = (target >= begin) & (target < begin + rows.shape[0])
        dlogits.scatter_add_(1, (target - begin).masked_fill(~inside, 0), (label_smoothing - 1.0) * scale * inside)
        dlogits = dlogits.to(hidden.dtype)
        if dhidden is not None:
            dhidden += dlogits @ rows
        if weight_wanted:
            dweight[begin : begin + columns] = dlogits.t() @ hidden
    return hidden.new_empty(0) if dhidden is None else dhidden.to(hidden.dtype), dweight


def loss_sum_cpu(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward, then backward: on a CPU, accumulating dweight over chunks costs more than recomputing the logits."""
    losses, sums = loss_rows_cpu(hidden, weight, labels, ignore_index, label_smoothing)
    options = (ignore_index, label_smoothing, hidden_wanted, weight_wanted)
    return losses.sum(), *loss_rows_backward_cpu(torch.ones_like(losses), sums, hidden, weight, labels, *options)
