"""linear_cross_entropy: chunks of rows through PyTorch's products, with one kernel in between that turns a chunk's logits into losses and,
in place, into their gradient.

A training step needs three products of 2 M V C operations: logits, dhidden and dweight. Where the gradient of every row's loss is
known beforehand up to one factor (mean and sum), all three are done while a chunk's logits are there; else the logits are computed
a second time in the backward. Chunks of the vocabulary instead of rows would write dweight once, but always need the fourth product.
[Liger Kernel, Hsu et al. 2024, arXiv:2410.10989]
"""

import torch
import triton
import triton.language as tl

from qvl_kernels import tuning
from qvl_kernels.triton_lib import launch

__all__ = ["launch_loss_rows", "launch_loss_rows_backward", "launch_loss_sum"]


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, sums_ptr, scales_ptr, vocabulary, tokens, ignore_index, smoothing, stride_logits,
    LOSS: tl.constexpr, GRADIENT: tl.constexpr, SMOOTHED: tl.constexpr, HAS_SCALES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row x of logits, with m = max x and l = log sum exp(x - m).

    LOSS: loss = l + (1 - s) (m - x[label]) + s (m - mean x); 0 where ignored. Stores m and l.
    GRADIENT: in the place of x, scale (exp(x - m - l) - (1 - s) onehot(label) - s / V); scale is 0 where ignored.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    if LOSS:
        # Before the loop, whose reductions hold all warps together: later another warp may have written here already.
        inside = (label >= 0) & (label < vocabulary)
        target = tl.load(logits_ptr + tl.where(inside, label, 0), mask=inside, other=float("nan")).to(tl.float32)
        m, l, total = -3.4028234663852886e38, 0.0, 0.0  # finite, so that a block of -inf does not become NaN
        for begin in range(0, vocabulary, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + offs, mask=offs < vocabulary, other=float("-inf")).to(tl.float32)  # [BLOCK]
            largest = tl.maximum(m, tl.max(x, 0))
            l = l * tl.exp(m - largest) + tl.sum(tl.exp(x - largest), 0)
            m = largest
            if SMOOTHED:
                total += tl.sum(tl.where(offs < vocabulary, x, 0.0), 0)
        l = tl.log(l)
        loss = l + (1.0 - smoothing) * (m - target)
        if SMOOTHED:
            loss += smoothing * (m - total / vocabulary)
        tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))
        tl.store(sums_ptr + row, m)
        tl.store(sums_ptr + tokens + row, l)
    else:
        m, l = tl.load(sums_ptr + row), tl.load(sums_ptr + tokens + row)
    if GRADIENT:
        scale = tl.where(counted, tl.load(scales_ptr + row) if HAS_SCALES else 1.0, 0.0)
        for begin in range(0, vocabulary, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + offs, mask=offs < vocabulary, other=0.0).to(tl.float32)  # [BLOCK]
            gradient = tl.exp((x - m) - l) - tl.where(offs == label, 1.0 - smoothing, 0.0)
            if SMOOTHED:
                gradient -= smoothing / vocabulary
            tl.store(logits_ptr + offs, (scale * gradient).to(logits_ptr.dtype.element_ty), mask=offs < vocabulary)


def _chunked(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float, sums: torch.Tensor, *,
    losses: torch.Tensor | None = None, scales: torch.Tensor | None = None, dhidden: torch.Tensor | None = None,
    dweight: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes ``losses`` and ``sums`` if losses are asked for (else reads ``sums``), and the gradients that are asked for."""
    (tokens, _), vocabulary = hidden.shape, weight.shape[0]
    rows = tuning.cross_entropy_rows(tokens, dweight is not None)
    tile = tuning.cross_entropy(vocabulary)
    logits = torch.empty((min(rows, tokens), vocabulary), dtype=hidden.dtype, device=hidden.device)
    gradient = dhidden is not None or dweight is not None
    for begin in range(0, tokens, rows):
        part = slice(begin, min(begin + rows, tokens))
        count = part.stop - begin
        chunk, some = logits[:count], hidden[part]
        torch.mm(some, weight.t(), out=chunk)
        launch(
            _cross_entropy_kernel, (count,),
            chunk, labels[part], sums[0] if losses is None else losses[part], sums[:, part], sums[0] if scales is None else scales[part],
            vocabulary, tokens, ignore_index, label_smoothing, vocabulary,
            LOSS=losses is not None, GRADIENT=gradient, SMOOTHED=label_smoothing > 0.0, HAS_SCALES=scales is not None, **tile,
        )  # fmt: skip
        if dhidden is not None:
            torch.mm(chunk, weight, out=dhidden[part])
        if dweight is not None and begin == 0:
            torch.mm(chunk.t(), some, out=dweight)
        elif dweight is not None:
            torch.addmm(dweight, chunk.t(), some, out=dweight)
    if dweight is not None and tokens == 0:
        dweight.zero_()


def _empty(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, sums)"""
    return torch.empty((tokens,), dtype=torch.float32, device=device), torch.empty((2, tokens), dtype=torch.float32, device=device)


def _like(x: torch.Tensor, wanted: bool) -> torch.Tensor | None:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None


def _or_nothing(x: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    return torch.empty((0,), dtype=x.dtype, device=x.device) if gradient is None else gradient


def launch_loss_rows(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    losses, sums = _empty(hidden.shape[0], hidden.device)
    _chunked(hidden, weight, labels.contiguous(), ignore_index, label_smoothing, sums, losses=losses)
    return losses, sums


def launch_loss_rows_backward(
    grad: torch.Tensor, sums: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int,
    label_smoothing: float, hidden_wanted: bool, weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    dhidden, dweight = _like(hidden, hidden_wanted), _like(weight, weight_wanted)
    _chunked(
        hidden, weight, labels.contiguous(), ignore_index, label_smoothing, sums, scales=grad.contiguous(), dhidden=dhidden, dweight=dweight
    )
    return _or_nothing(hidden, dhidden), _or_nothing(weight, dweight)


def launch_loss_sum(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float, hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    losses, sums = _empty(hidden.shape[0], hidden.device)
    dhidden, dweight = _like(hidden, hidden_wanted), _like(weight, weight_wanted)
    _chunked(hidden, weight, labels.contiguous(), ignore_index, label_smoothing, sums, losses=losses, dhidden=dhidden, dweight=dweight)
    return losses.sum(), _or_nothing(hidden, dhidden), _or_nothing(weight, dweight)
