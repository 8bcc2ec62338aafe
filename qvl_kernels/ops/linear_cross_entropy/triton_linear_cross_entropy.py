"""linear_cross_entropy: blocks of logits through PyTorch's products, with one kernel in between that turns them into losses or, in
place, into their gradient.

Losses and dhidden go by rows: a block of whole rows of logits is all that they need. dweight goes by columns: a block of them makes rows of
dweight, each written once. That takes the logits a second time, a fourth product of 2 M V C operations, but no memory: the first time they
lie where dweight will be, the second time mostly in what is not written yet of it. By rows with three products [Liger Kernel, Hsu et al. 2024,
arXiv:2410.10989] dweight is read and written for every block, so that blocks are either small and slow or large.
"""

import torch
import triton
import triton.language as tl

from qvl_kernels import tuning
from qvl_kernels.triton_lib import launch

__all__ = ["launch_loss_rows", "launch_loss_rows_backward", "launch_loss_sum"]


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, sums_ptr, scales_ptr, columns, first, vocabulary, tokens, ignore_index, smoothing,
    LOSS: tl.constexpr, GRADIENT: tl.constexpr, SMOOTHED: tl.constexpr, HAS_SCALES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row x of logits, columns ``first`` and on, with m = max x and l = log sum exp(x - m) of all of them.

    LOSS (all columns are there): loss = l + (1 - s) (m - x[label]) + s (m - mean x); 0 where ignored. Stores m and l.
    GRADIENT: in the place of x, scale (exp(x - m - l) - (1 - s) onehot(label) - s / V); scale is 0 where ignored.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * columns
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    if LOSS:
        # Before the loop, whose reductions hold all warps together: later another warp may have written here already.
        inside = (label >= 0) & (label < vocabulary)
        target = tl.load(logits_ptr + tl.where(inside, label, 0), mask=inside, other=float("nan")).to(tl.float32)
        m, l, total = -3.4028234663852886e38, 0.0, 0.0  # finite, so that a block of -inf does not become NaN
        for begin in range(0, columns, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + offs, mask=offs < columns, other=float("-inf")).to(tl.float32)  # [BLOCK]
            largest = tl.maximum(m, tl.max(x, 0))
            l = l * tl.exp(m - largest) + tl.sum(tl.exp(x - largest), 0)
            m = largest
            if SMOOTHED:
                total += tl.sum(tl.where(offs < columns, x, 0.0), 0)
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
        for begin in range(0, columns, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + offs, mask=offs < columns, other=0.0).to(tl.float32)  # [BLOCK]
            gradient = tl.exp((x - m) - l) - tl.where(first + offs == label, 1.0 - smoothing, 0.0)
            if SMOOTHED:
                gradient -= smoothing / vocabulary
            tl.store(logits_ptr + offs, (scale * gradient).to(logits_ptr.dtype.element_ty), mask=offs < columns)


def _products(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float, sums: torch.Tensor, *,
    losses: torch.Tensor | None = None, scales: torch.Tensor | None = None, dhidden: torch.Tensor | None = None,
    dweight: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes ``losses`` and ``sums`` if losses are asked for (else reads ``sums``), and the gradients that are asked for."""
    if hidden.shape[0] == 0:
        if dweight is not None:
            dweight.zero_()
        return
    rest = (hidden, weight, labels, ignore_index, label_smoothing, sums)
    if dweight is None:
        _by_rows(*rest, losses, scales, dhidden, None)
        return
    if losses is not None:
        _by_rows(*rest, losses, None, None, dweight)
    _by_columns(*rest, scales, dhidden, dweight)


def _by_rows(hidden, weight, labels, ignore_index, label_smoothing, sums, losses, scales, dhidden, memory) -> None:
    """Blocks of whole rows of logits, in ``memory`` [V, C] if there is some."""
    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    if memory is None:
        rows = min(tuning.cross_entropy_rows(), tokens)
        memory = torch.empty((rows, vocabulary), dtype=hidden.dtype, device=hidden.device)
    else:
        rows = width
    memory = memory.view(-1)
    for begin in range(0, tokens, rows):
        part = slice(begin, min(begin + rows, tokens))
        count = part.stop - begin
        logits = memory[: count * vocabulary].view(count, vocabulary)
        torch.mm(hidden[part], weight.t(), out=logits)
        launch(
            _cross_entropy_kernel, (count,),
            logits, labels[part], sums[0] if losses is None else losses[part], sums[:, part], sums[0] if scales is None else scales[part],
            vocabulary, 0, vocabulary, tokens, ignore_index, label_smoothing,
            LOSS=losses is not None, GRADIENT=dhidden is not None, SMOOTHED=label_smoothing > 0.0, HAS_SCALES=scales is not None,
            **tuning.cross_entropy(vocabulary),
        )  # fmt: skip
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[part])


def _by_columns(hidden, weight, labels, ignore_index, label_smoothing, sums, scales, dhidden, dweight) -> None:
    """Blocks of whole columns of logits, whose gradients are those of as many rows of dweight. They lie in rows of it that come later, as
    long as these suffice."""
    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    scratch = None
    begin = 0
    while begin < vocabulary:
        columns = tuning.cross_entropy_columns(tokens, width, vocabulary - begin)
        part, size = slice(begin, begin + columns), tokens * columns
        memory = dweight[part.stop :].view(-1)
        if memory.numel() < size:
            if scratch is None:
                scratch = torch.empty((size,), dtype=hidden.dtype, device=hidden.device)
            memory = scratch
        logits = memory[memory.numel() - size :].view(tokens, columns)
        torch.mm(hidden, weight[part].t(), out=logits)
        launch(
            _cross_entropy_kernel, (tokens,),
            logits, labels, sums[0], sums, sums[0] if scales is None else scales, columns, begin, vocabulary, tokens, ignore_index, label_smoothing,
            LOSS=False, GRADIENT=True, SMOOTHED=label_smoothing > 0.0, HAS_SCALES=scales is not None, **tuning.cross_entropy(columns),
        )  # fmt: skip
        torch.mm(logits.t(), hidden, out=dweight[part])
        if dhidden is not None and begin == 0:
            torch.mm(logits, weight[part], out=dhidden)
        elif dhidden is not None:
            torch.addmm(dhidden, logits, weight[part], out=dhidden)
        begin = part.stop


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
    _products(hidden, weight, labels.contiguous(), ignore_index, label_smoothing, sums, losses=losses)
    return losses, sums


def launch_loss_rows_backward(
    grad: torch.Tensor, sums: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int,
    label_smoothing: float, hidden_wanted: bool, weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    dhidden, dweight = _like(hidden, hidden_wanted), _like(weight, weight_wanted)
    _products(
        hidden, weight, labels.contiguous(), ignore_index, label_smoothing, sums, scales=grad.contiguous(), dhidden=dhidden, dweight=dweight
    )
    return _or_nothing(hidden, dhidden), _or_nothing(weight, dweight)


def launch_loss_sum(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float, hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    losses, sums = _empty(hidden.shape[0], hidden.device)
    dhidden, dweight = _like(hidden, hidden_wanted), _like(weight, weight_wanted)
    _products(hidden, weight, labels.contiguous(), ignore_index, label_smoothing, sums, losses=losses, dhidden=dhidden, dweight=dweight)
    return losses.sum(), _or_nothing(hidden, dhidden), _or_nothing(weight, dweight)
