"""linear_cross_entropy: PyTorch's GEMMs compute blocks of logits, one kernel turns them into losses or, in place,
gradients.

Losses and dhidden use blocks of whole rows of logits. dweight uses blocks of columns, each of which produces rows of
dweight that are written once. The logits are then computed twice, a fourth GEMM of 2 M V C operations, but need little
memory: the first time they lie where dweight will be, the second time mostly in its unwritten rows. With blocks of
rows and three GEMMs [Liger Kernel, Hsu et al. 2024, arXiv:2410.10989] every block reads and writes the whole dweight,
so that blocks are either small and slow or large.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from qvl_kernels.gpu.launch import launch
from qvl_kernels.ops.linear_cross_entropy import tiles

__all__ = ["launch_loss_rows", "launch_loss_rows_backward", "launch_loss_sum"]

# Whether torch.addmm can accumulate a 16-bit GEMM into an fp32 output.
SUMS_IN_FP32 = not torch.version.hip and tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    sums_ptr,
    scales_ptr,
    columns,
    first,
    vocabulary,
    tokens,
    ignore_index,
    smoothing,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row x of logits, columns from ``first`` on; m_i = max x, l_i = log sum exp(x - m_i) over all
    columns.

    LOSS (needs all columns): loss = l_i + (1 - s) (m_i - x[label]) + s (m_i - mean x), 0 where ignored; stores m_i and
    l_i, found by online softmax.
    GRADIENT: overwrites x with scale (exp(x - m_i - l_i) - (1 - s) onehot(label) - s / V); scale is 0 where ignored.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * columns
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    if LOSS:
        # The label's logit is loaded before the loop, whose reductions synchronise the warps: after it, another warp
        # may already have overwritten the logit with its gradient.
        inside = (label >= 0) & (label < vocabulary)
        target = tl.load(logits_ptr + tl.where(inside, label, 0), mask=inside, other=float("nan")).to(tl.float32)
        # m_i starts finite, so that a block of -inf does not give NaN.
        m_i, l_i, total = -3.4028234663852886e38, 0.0, 0.0
        for begin in range(0, columns, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + offs, mask=offs < columns, other=float("-inf")).to(tl.float32)  # [BLOCK]
            m_new = tl.maximum(m_i, tl.max(x, 0))
            l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(x - m_new), 0)
            m_i = m_new
            if SMOOTHED:
                total += tl.sum(tl.where(offs < columns, x, 0.0), 0)
        l_i = tl.log(l_i)
        loss = l_i + (1.0 - smoothing) * (m_i - target)
        if SMOOTHED:
            loss += smoothing * (m_i - total / vocabulary)
        tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))
        tl.store(sums_ptr + row, m_i)
        tl.store(sums_ptr + tokens + row, l_i)
    else:
        m_i, l_i = tl.load(sums_ptr + row), tl.load(sums_ptr + tokens + row)
    if GRADIENT:
        scale = tl.where(counted, tl.load(scales_ptr + row) if HAS_SCALES else 1.0, 0.0)
        for begin in range(0, columns, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + offs, mask=offs < columns, other=0.0).to(tl.float32)  # [BLOCK]
            gradient = tl.exp((x - m_i) - l_i) - tl.where(first + offs == label, 1.0 - smoothing, 0.0)
            if SMOOTHED:
                gradient -= smoothing / vocabulary
            tl.store(logits_ptr + offs, (scale * gradient).to(logits_ptr.dtype.element_ty), mask=offs < columns)


class _Logits:
    """Blocks of the logits hidden weight^T, turned into losses or their gradient in place."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: int,
        label_smoothing: float,
        sums: torch.Tensor,
        losses: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
    ) -> None:
        self.hidden, self.weight, self.labels, self.sums, self.losses, self.scales = (
            hidden,
            weight,
            labels.contiguous(),
            sums,
            losses,
            scales,
        )
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        (self.tokens, self.width), self.vocabulary = hidden.shape, weight.shape[0]

    def block(self, memory: torch.Tensor, rows: slice, columns: slice, *, loss: bool, gradient: bool) -> torch.Tensor:
        """Logits [rows, columns] at the end of ``memory``, or their gradient. With ``loss``, for whole rows, losses and
        sums are stored; else sums are read.
        """
        count, size = rows.stop - rows.start, columns.stop - columns.start
        memory = memory.view(-1)
        logits = memory[memory.numel() - count * size :].view(count, size)
        torch.mm(self.hidden[rows], self.weight[columns].t(), out=logits)
        launch(
            _cross_entropy_kernel,
            (count,),
            logits_ptr=logits,
            labels_ptr=self.labels[rows],
            losses_ptr=self.losses[rows] if loss else self.sums[0],
            sums_ptr=self.sums[:, rows],
            scales_ptr=self.sums[0] if self.scales is None else self.scales[rows],
            columns=size,
            first=columns.start,
            vocabulary=self.vocabulary,
            tokens=self.tokens,
            ignore_index=self.ignore_index,
            smoothing=self.label_smoothing,
            LOSS=loss,
            GRADIENT=gradient,
            SMOOTHED=self.label_smoothing > 0.0,
            HAS_SCALES=self.scales is not None,
            **tiles.cross_entropy(size),
        )
        return logits

    def by_rows(self, dhidden: torch.Tensor | None, dweight: torch.Tensor | None) -> None:
        """Blocks of rows: losses if wanted, and dhidden if dweight is not. With dweight only losses are computed here,
        in its memory.
        """
        memory, everything = dweight, slice(0, self.vocabulary)
        rows = max(1, self.width)
        if memory is None:
            rows = min(tiles.cross_entropy_rows(), self.tokens)
            memory = torch.empty((rows, self.vocabulary), dtype=self.hidden.dtype, device=self.hidden.device)
        gradient = dweight is None and dhidden is not None
        for part in _parts(self.tokens, rows):
            logits = self.block(memory, part, everything, loss=self.losses is not None, gradient=gradient)
            if gradient:
                torch.mm(logits, self.weight, out=dhidden[part])

    def by_columns(self, dhidden: torch.Tensor | None, dweight: torch.Tensor) -> None:
        """Blocks of columns: both gradients. As long as a block fits, its logits lie in unwritten rows of dweight, the
        last of which hold dhidden's fp32 sum. The remaining columns go in blocks of rows, in a buffer as large as
        hidden or a sixteenth of their logits.
        """
        everything, begin, total = slice(0, self.tokens), 0, None
        free, words = self.vocabulary, 4 // dweight.element_size()
        if dhidden is not None:
            free = (free - words * self.tokens) // words * words  # the fp32 sum starts at an even 16-bit row
        while columns := tiles.cross_entropy_columns(self.tokens, self.width, free - begin):
            part = slice(begin, begin + columns)
            logits = self.block(dweight[part.stop : free], everything, part, loss=False, gradient=True)
            torch.mm(logits.t(), self.hidden, out=dweight[part])
            if dhidden is not None:
                first = total is None
                if first:
                    total = dweight[free : free + words * self.tokens].view(-1).view(torch.float32).view(dhidden.shape)
                _add_matmul(total, logits, self.weight[part], first)
            begin = part.stop
        if total is not None:
            dhidden.copy_(total)
        part = slice(begin, self.vocabulary)
        size = part.stop - part.start
        rows = min(self.tokens, max(self.tokens * self.width // max(1, size), -(-self.tokens // 16), 1))
        memory = torch.empty((rows, size), dtype=self.hidden.dtype, device=self.hidden.device)
        for some in _parts(self.tokens, rows):
            logits = self.block(memory, some, part, loss=False, gradient=True)
            _matmul(dweight[part], logits.t(), self.hidden[some], some.start == 0)
            if dhidden is not None:
                _matmul(dhidden[some], logits, self.weight[part], total is None)


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _matmul(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """out = a b, or out += a b."""
    if first:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(out, a, b, out=out)


def _add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """fp32 total = a b, or += a b."""
    if first:
        total.zero_()
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda and SUMS_IN_FP32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b)


def _loss_and_gradients(logits: _Logits, dhidden: torch.Tensor | None, dweight: torch.Tensor | None) -> None:
    """Writes losses and sums if losses are wanted (else reads sums), and the wanted gradients."""
    if logits.tokens == 0:
        if dweight is not None:
            dweight.zero_()
        return
    if dweight is None or logits.losses is not None:
        logits.by_rows(dhidden, dweight)
    if dweight is not None:
        logits.by_columns(dhidden, dweight)


def _empty(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised (losses, sums)."""
    return torch.empty((tokens,), dtype=torch.float32, device=device), torch.empty(
        (2, tokens), dtype=torch.float32, device=device
    )


def _like(x: torch.Tensor, wanted: bool) -> torch.Tensor | None:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None


def _or_nothing(x: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    return torch.empty((0,), dtype=x.dtype, device=x.device) if gradient is None else gradient


def launch_loss_rows(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    losses, sums = _empty(hidden.shape[0], hidden.device)
    _loss_and_gradients(_Logits(hidden, weight, labels, ignore_index, label_smoothing, sums, losses), None, None)
    return losses, sums


def launch_loss_rows_backward(
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
    dhidden, dweight = _like(hidden, hidden_wanted), _like(weight, weight_wanted)
    _loss_and_gradients(
        _Logits(hidden, weight, labels, ignore_index, label_smoothing, sums, scales=grad.contiguous()), dhidden, dweight
    )
    return _or_nothing(hidden, dhidden), _or_nothing(weight, dweight)


def launch_loss_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    losses, sums = _empty(hidden.shape[0], hidden.device)
    dhidden, dweight = _like(hidden, hidden_wanted), _like(weight, weight_wanted)
    _loss_and_gradients(_Logits(hidden, weight, labels, ignore_index, label_smoothing, sums, losses), dhidden, dweight)
    return losses.sum(), _or_nothing(hidden, dhidden), _or_nothing(weight, dweight)
