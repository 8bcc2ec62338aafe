"""qvl::linear_cross_entropy_rows: per-token loss from chunks of logits; the backward recomputes each chunk.

[Cut Your Losses, Wijmans et al. 2024, arXiv:2411.09009: the [M, V] logits are never materialised.]
"""

import torch

from qvl_kernels.library import register
from qvl_kernels.ops.linear.cpu import linear_op

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
        target = labels[begin:end]
        lse = torch.logsumexp(logits, -1)
        loss = lse - logits.gather(1, target.clamp_min(0)[:, None])[:, 0] * (1.0 - label_smoothing)
        if label_smoothing > 0.0:
            loss -= logits.mean(-1) * label_smoothing
        losses[begin:end] = loss.masked_fill_(target == ignore_index, 0.0)
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
    hidden, weight, labels, lses = ctx.saved_tensors
    if grad_losses is None:
        grad_losses = torch.zeros_like(lses)
    scale = grad_losses.masked_fill(labels == ctx.ignore_index, 0.0)
    dhidden, dweight = torch.zeros_like(hidden), torch.zeros(weight.shape, dtype=torch.float32)
    vocabulary = weight.shape[0]
    for begin, end in _chunks(hidden.shape[0], vocabulary):
        rows = hidden[begin:end]
        probabilities = torch.exp(_logits(rows, weight) - lses[begin:end, None])
        probabilities.mul_(scale[begin:end, None])
        if ctx.label_smoothing > 0.0:
            probabilities.sub_(scale[begin:end, None] * (ctx.label_smoothing / vocabulary))
        target = labels[begin:end].clamp_min(0)[:, None]
        probabilities.scatter_add_(1, target, -(1.0 - ctx.label_smoothing) * scale[begin:end, None])
        if grad_lses is not None:
            raise RuntimeError("linear_cross_entropy: the log-sum-exp output has no gradient")
        dlogits = probabilities.to(hidden.dtype)
        dhidden[begin:end] = dlogits @ weight
        dweight += (dlogits.t() @ rows).float()
    return dhidden, dweight.to(weight.dtype), None, None, None


linear_cross_entropy_rows_op = register(
    "linear_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, float label_smoothing)"
    " -> (Tensor, Tensor)",
    cpu=_rows_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
