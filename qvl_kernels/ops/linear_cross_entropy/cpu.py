"""qvl::linear_cross_entropy_rows: per-token loss from chunks of logits; the backward recomputes each chunk.

[Cut Your Losses, Wijmans et al. 2024, arXiv:2411.09009: the [M, V] logits are never materialised.]
"""

import torch

from qvl_kernels.library import register
from qvl_kernels.ops.linear.op import linear_op

__all__ = ["linear_cross_entropy_rows_op"]

CHUNK_LOGITS = 1 << 24  # logits held at once (64 MB of fp32)


def _chunks(tokens: int, vocabulary: int):
    rows = max(1, CHUNK_LOGITS // max(1, vocabulary))
    return ((begin, min(begin + rows, tokens)) for begin in range(0, tokens, rows))


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear_op(hidden, weight, None).float()


def _rows_cpu(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    losses, lses = torch.empty(tokens, dtype=torch.float32), torch.empty(tokens, dtype=torch.float32)
    for begin, end in _chunks(tokens, vocabulary):
        logits = _logits(hidden[begin:end], weight)
        ignored = labels[begin:end] == ignore_index
        target = labels[begin:end].masked_fill(ignored, 0)[:, None]
        lse = torch.logsumexp(logits, -1)
        loss = lse - logits.gather(1, target)[:, 0] * (1.0 - label_smoothing)
        if label_smoothing > 0.0:
            loss -= logits.mean(-1) * label_smoothing
        losses[begin:end] = loss.masked_fill_(ignored, 0.0)
        lses[begin:end] = lse
    return losses, lses


def _fake(hidden, weight, labels, ignore_index, label_smoothing):
    shape, options = (hidden.shape[0],), {"dtype": torch.float32, "device": hidden.device}
    return torch.empty(shape, **options), torch.empty(shape, **options)


def _setup(ctx, inputs, output) -> None:
    hidden, weight, labels, ctx.ignore_index, ctx.label_smoothing = inputs
    ctx.save_for_backward(hidden, weight, labels, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_losses, grad_lses):
    """With p = softmax(logits): dlogits = g (p - (1 - s) onehot(label) - s / V) + g_lse p, one slice of the vocabulary at a time,
    so that every row of dweight is written once and dhidden is summed in fp32."""
    hidden, weight, labels, lses = ctx.saved_tensors
    vocabulary, smoothing = weight.shape[0], ctx.label_smoothing
    counted = (labels != ctx.ignore_index)[:, None]
    scale = torch.zeros_like(lses) if grad_losses is None else grad_losses
    scale = scale[:, None] * counted
    p_scale = scale if grad_lses is None else scale + grad_lses[:, None]
    target = labels[:, None].masked_fill(~counted, 0)
    dhidden = torch.zeros(hidden.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
    dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
    columns = max(1, CHUNK_LOGITS // max(1, hidden.shape[0]))
    for begin in range(0, vocabulary, columns):
        rows = weight[begin : begin + columns]
        dlogits = _logits(hidden, rows).sub_(lses[:, None]).exp_().mul_(p_scale)
        if smoothing > 0.0:
            dlogits.sub_(scale * (smoothing / vocabulary))
        inside = (target >= begin) & (target < begin + rows.shape[0])
        dlogits.scatter_add_(1, (target - begin).masked_fill(~inside, 0), (smoothing - 1.0) * scale * inside)
        dlogits = dlogits.to(hidden.dtype)
        if dhidden is not None:
            dhidden += dlogits @ rows
        if dweight is not None:
            dweight[begin : begin + columns] = dlogits.t() @ hidden
    return None if dhidden is None else dhidden.to(hidden.dtype), dweight, None, None, None


linear_cross_entropy_rows_op = register(
    "linear_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, float label_smoothing)"
    " -> (Tensor, Tensor)",
    cpu=_rows_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
