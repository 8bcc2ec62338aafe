"""linear_cross_entropy on GPUs beyond the shared cases: chunks, both computations of the gradients, and logits that are
huge or not finite.
"""

import pytest
import torch

import qvl_kernels
from qvl_kernels.gpu import launch as gpu_launch
from qvl_kernels.ops.linear_cross_entropy import tiles
from qvl_kernels.ops.linear_cross_entropy.op import loss_rows_op, loss_sum_op
from qvl_kernels.testing import GuardedEmpty, assert_close_to_fp64, random_tensor, surrounded

M, V, C = 21, 50, 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tiles, "cross_entropy_rows", lambda: 8)
    monkeypatch.setattr(
        tiles, "cross_entropy_columns", lambda tokens, width, free: max(0, free) * width // (tokens + width) // 2
    )
    monkeypatch.setattr(tiles, "cross_entropy", lambda vocabulary: {"BLOCK": 16, "num_warps": 1})


def _inputs(dtype, *, scale: float = 1.0, strided: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    columns = C + 3 if strided else C
    hidden = random_tensor((M, columns), dtype, generator, scale=scale)[:, :C]
    weight = random_tensor((V, columns), dtype, generator)[:, :C]
    labels = torch.randint(0, V, (M,), generator=generator)
    labels[3:6] = -100
    return hidden, weight, labels


def _reference(hidden, weight, labels, cotangent=None, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with qvl_kernels.use_backend("reference"):
        loss = qvl_kernels.linear_cross_entropy(hidden, weight, labels, **options)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), cotangent)


def _triton(hidden, weight, labels, device, cotangent=None, **options):
    hidden, weight = (surrounded(x.detach().to(device)).requires_grad_() for x in (hidden, weight))
    labels = surrounded(labels.to(device))
    with qvl_kernels.use_backend("triton"):
        loss = qvl_kernels.linear_cross_entropy(hidden, weight, labels, **options)
        grads = torch.autograd.grad(loss, (hidden, weight), None if cotangent is None else cotangent.to(device))
    return tuple(x.detach().cpu() for x in (loss, *grads))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunks_add_up(reduction, smoothing, dtype, device, monkeypatch):
    inputs, options = _inputs(dtype, strided=True), {"reduction": reduction, "label_smoothing": smoothing}
    cotangent = random_tensor((M,) if reduction == "none" else (), torch.float32, torch.Generator().manual_seed(1))
    guard = GuardedEmpty()
    monkeypatch.setattr(torch, "empty", guard)
    ours = _triton(*inputs, device, cotangent, **options)
    monkeypatch.undo()
    guard.check()
    golden = _reference(*(x.double() for x in inputs[:2]), inputs[2], cotangent.double(), **options)
    baseline = _reference(*inputs, cotangent, **options)
    for factor, out, plain, exact in zip((2.0, 3.0, 3.0), ours, baseline, golden):
        assert_close_to_fp64(out, plain, exact, factor=factor)


def test_gradients_made_with_the_loss(dtype, device):
    """The path of bf16 and fp32; fp16 takes another because of loss scaling, with the same kernel."""
    hidden, weight, labels = (x.to(device) for x in _inputs(dtype))
    with qvl_kernels.use_backend("triton"):
        out = loss_sum_op(hidden, weight, labels, -100, 0.1, True, True)
    options = {"reduction": "sum", "label_smoothing": 0.1}
    hidden, weight, labels = _inputs(dtype)
    golden, baseline = (
        _reference(hidden.double(), weight.double(), labels, **options),
        _reference(hidden, weight, labels, **options),
    )
    for ours, plain, exact in zip(out, baseline, golden):
        assert_close_to_fp64(ours.cpu(), plain, exact, factor=3.0)


@pytest.mark.parametrize(
    ("wanted", "kind", "reduction", "products"),
    # Losses by 3 blocks of rows, or in the memory of dweight by 2; gradients of hidden alone with them; else by blocks
    # of columns, then of rows.
    [
        ((True, True), torch.float32, "mean", 2 + 3 * (10 + 2)),
        ((True, False), torch.float32, "sum", 3 * 2),
        ((False, True), torch.float32, "mean", 2 + 2 * (13 + 1)),
        ((True, True), torch.float32, "none", 3 + 3 * (10 + 2)),
        ((True, True), torch.float16, "mean", 3 + 3 * (4 + 3)),
        ((False, False), torch.float32, "mean", 3),
    ],
    ids=str,
)
def test_no_product_too_many(wanted, kind, reduction, products, device, monkeypatch):
    hidden, weight, labels = (x.to(device) for x in _inputs(kind))
    hidden.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])
    made, allocated, empty = [], [], torch.empty
    for name in ("mm", "addmm"):
        monkeypatch.setattr(
            torch,
            name,
            lambda *args, original=getattr(torch, name), **options: made.append(1) or original(*args, **options),
        )
    monkeypatch.setattr(
        torch, "empty", lambda shape, **options: allocated.append(torch.Size(shape).numel()) or empty(shape, **options)
    )
    with qvl_kernels.use_backend("triton"):
        loss = qvl_kernels.linear_cross_entropy(hidden, weight, labels, reduction=reduction)
        if any(wanted):
            loss.sum().backward()
    assert [x.grad is not None for x in (hidden, weight)] == list(wanted)
    assert len(made) == products
    assert max(allocated) <= max(8 * V, M * C + V, V * C if wanted[1] else 0)


@pytest.mark.parametrize(("tokens", "words", "width"), [(9, 51, 15), (4, 40, 7), (1, 3, 5), (30, 33, 16)])
def test_odd_sizes(tokens, words, width, dtype, device):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = random_tensor((tokens, width), dtype, generator), random_tensor((words, width), dtype, generator)
    labels = torch.randint(0, words, (tokens,), generator=generator)
    ours = _triton(hidden, weight, labels, device)
    golden, baseline = _reference(hidden.double(), weight.double(), labels), _reference(hidden, weight, labels)
    for factor, out, plain, exact in zip((2.0, 3.0, 3.0), ours, baseline, golden):
        assert_close_to_fp64(out, plain, exact, factor=factor, floor=4 * torch.finfo(dtype).eps)


def test_two_backward_passes_over_one_graph(device):
    hidden, weight, labels = _inputs(torch.float32)
    _, *expected = _reference(hidden, weight, labels)
    hidden, weight, labels = (x.to(device) for x in (hidden, weight, labels))
    hidden.requires_grad_(), weight.requires_grad_()
    with qvl_kernels.use_backend("triton"):
        loss = qvl_kernels.linear_cross_entropy(hidden, weight, labels)
    for factor, keep in ((3.0, True), (0.0, True), (1.0, True), (-2.0, False)):
        grads = torch.autograd.grad(factor * loss, (hidden, weight), retain_graph=keep)
        for gradient, exact in zip(grads, expected):
            torch.testing.assert_close(gradient.cpu(), factor * exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored(reduction, dtype, device):
    hidden, weight, labels = _inputs(dtype)
    labels.fill_(-100)
    cotangent = torch.ones(M) if reduction == "none" else None
    ours = _triton(hidden, weight, labels, device, cotangent, reduction=reduction)
    loss, *grads = _reference(hidden, weight, labels, cotangent, reduction=reduction)
    assert torch.equal(ours[0].isnan(), loss.isnan()) and (reduction == "mean" or not ours[0].any())
    for gradient, expected in zip(ours[1:], grads):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


def test_huge_logits(device):
    """Logits around 10,000: only differences between logits matter."""
    inputs = _inputs(torch.float32, scale=3000.0)
    inputs[1][1::2] = inputs[1][
        ::2
    ]  # pairs of equal logits, so that losses are near log 2 where the label is of the largest pair
    largest = (inputs[0].double() @ inputs[1].double().t()).argmax(1)
    inputs[2][8:] = largest[8:]
    golden = _reference(*(x.double() for x in inputs[:2]), inputs[2], torch.ones(M).double(), reduction="none")
    baseline = _reference(*inputs, torch.ones(M), reduction="none")
    ours = _triton(*inputs, device, torch.ones(M), reduction="none")
    # Logits are computed twice, by matmuls of different shapes, which limits the accuracy of the gradients.
    for floor, out, plain, exact in zip(
        (None, 4e4 * torch.finfo(torch.float32).eps, 4e4 * torch.finfo(torch.float32).eps), ours, baseline, golden
    ):
        assert_close_to_fp64(
            out[8:] if out.dim() == 1 else out,
            plain[8:] if plain.dim() == 1 else plain,
            exact[8:] if exact.dim() == 1 else exact,
            floor=floor,
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_as_the_reference(bad, reduction, dtype, device):
    hidden, weight, labels = _inputs(dtype)
    hidden[2, 1], hidden[4, 5] = bad, bad  # row 4 is ignored
    cotangent = torch.ones(M) if reduction == "none" else None
    ours = _triton(hidden, weight, labels, device, cotangent, reduction=reduction)
    # In fp64: a CPU matmul in 16 bits may read into the next row and multiply it by 0.
    for out, expected in zip(
        ours, _reference(hidden.double(), weight.double(), labels, cotangent, reduction=reduction)
    ):
        assert out.isfinite().nonzero().tolist() == expected.isfinite().nonzero().tolist()


def test_words_that_are_ruled_out(dtype, device):
    """Logits of -inf, a block of the kernel of them at once, have probability 0."""
    hidden, weight, labels = _inputs(torch.float32)
    hidden, weight = hidden.abs().to(dtype), weight.to(dtype)
    weight[:20] = float("-inf")
    labels = 20 + labels.clamp(0) % (V - 20)
    loss, *_ = _reference(hidden.double(), weight.double(), labels, torch.ones(M).double(), reduction="none")
    ours, dhidden, dweight = _triton(hidden, weight, labels, device, torch.ones(M), reduction="none")
    assert_close_to_fp64(ours, loss.float(), loss, floor=4 * torch.finfo(dtype).eps)
    assert dweight.isfinite().all() and not dweight[:20].any()


def test_labels_out_of_range_are_no_number_and_read_nothing(device):
    """On a GPU labels are not checked, since that would synchronise."""
    hidden, weight, labels = (x.to(device) for x in _inputs(torch.float32))
    labels[7], labels[9] = V, -1
    with qvl_kernels.use_backend("triton"):
        losses, _ = loss_rows_op(hidden, weight, labels, -100, 0.0)
    assert losses.isnan().nonzero().flatten().tolist() == [7, 9]


def test_empty(dtype, device):
    hidden, weight, labels = _inputs(dtype)
    loss, dhidden, dweight = _triton(hidden[:0], weight, labels[:0], device, reduction="sum")
    assert loss.item() == 0.0 and dhidden.shape == (0, C) and dweight.shape == (V, C) and not dweight.any()


def test_nothing_waits_for_the_device(dtype, device):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    hidden, weight, labels = (x.to(device) for x in _inputs(dtype))
    hidden.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        qvl_kernels.linear_cross_entropy(hidden, weight, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inference_computes_no_gradient(dtype, device):
    hidden, weight, labels = (x.to(device) for x in _inputs(dtype))
    hidden.requires_grad_()
    with torch.no_grad(), qvl_kernels.use_backend("triton"), gpu_launch.record() as launches:
        qvl_kernels.linear_cross_entropy(hidden, weight, labels)
    assert [launch.arguments["GRADIENT"] for launch in launches] == [False] * 3


def test_blocks_of_columns(monkeypatch):
    """The blocks fit into free memory, and are few."""
    monkeypatch.undo()
    for tokens, width, free, most in (
        (8192, 2048, 135_552, 15),
        (1, 2048, 151_936, 2),
        (60_000, 2048, 31_936, 1),
        (21, 16, 50, 0),
    ):
        blocks = 0
        while columns := tiles.cross_entropy_columns(tokens, width, free):
            free, blocks = free - columns, blocks + 1
            assert tokens * columns <= free * width
        assert blocks <= most and (blocks > 0) == (most > 0), (tokens, blocks)
    assert tiles.cross_entropy_columns(8192, 2048, -100) == 0
