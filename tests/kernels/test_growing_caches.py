"""Growing KV caches: contents, growth, memory and the pointer table. Kernels: tests/gpu."""

import weakref

import pytest
import torch

from qvl_kernels.ops.decoder_layer import growing_caches
from qvl_kernels.ops.decoder_layer.decode_step import decode_step
from qvl_kernels.ops.decoder_layer.growing_caches import GRAIN, GrowingCaches
from qvl_kernels.testing import poisoned_empty

LAYERS, ROWS, KV_HEADS, HEAD_DIM = 3, 5, 3, 6


def _caches() -> GrowingCaches:
    return GrowingCaches(LAYERS, ROWS, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))


def _random(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, KV_HEADS, length, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def _taken(batch: int, length: int, room: int) -> tuple[GrowingCaches, list[tuple[torch.Tensor, torch.Tensor]]]:
    caches, given = (
        _caches(),
        [(_random(batch, length, seed), _random(batch, length, seed + 10)) for seed in range(LAYERS)],
    )
    for index, (keys, values) in enumerate(given):
        caches.take(index, keys, values, length=room)
    return caches, given


def _check_table(caches: GrowingCaches) -> None:
    """Checks that the table has the addresses of all caches, and that its rows are aligned to 16 bytes, as kernels
    assume.
    """
    visible = caches.mask
    for keys, values, entry in zip(caches.keys, caches.values, caches.entries):
        assert entry.tolist()[:5] == [
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[2],
            visible.data_ptr(),
            visible.stride(0),
        ]
        assert keys.is_contiguous() and values.is_contiguous() and visible.shape[1] >= keys.shape[2]
        assert (
            keys.data_ptr() % 16
            == values.data_ptr() % 16
            == visible.data_ptr() % 16
            == keys.shape[2] % 16
            == visible.stride(0) % 16
            == 0
        )
        assert (entry.data_ptr() - caches.table.data_ptr()) % 16 == 0


def _check_content(caches: GrowingCaches, given) -> None:
    batch, _, length, _ = given[0][0].shape
    for index, expected in enumerate(given):
        assert all(map(torch.equal, caches.give(index, batch, length), expected))


@pytest.mark.parametrize(("batch", "length", "room"), [(5, 7, 7), (1, 64, 65), (3, 130, 200)])
def test_what_is_taken_stays_through_growth(batch, length, room):
    caches, given = _taken(batch, length, room)
    assert caches.capacity == -(-room // GRAIN) * GRAIN
    table = caches.table.data_ptr()
    for needed in (length + 1, room + 70, 700, 701):
        caches.reserve(needed)
        assert caches.capacity >= needed and caches.table.data_ptr() == table
        _check_table(caches)
        _check_content(caches, given)


def test_growth_is_geometric():
    """Token by token, capacity grows by at most half, to multiples of 64, in few steps; in one step where more is
    needed.
    """
    caches, sizes = _caches(), []
    for length in range(1, 4097):
        caches.reserve(length)
        assert caches.capacity >= length
        if not sizes or caches.capacity != sizes[-1]:
            sizes.append(caches.capacity)
    assert sizes[0] == 64 and all(size % 64 == 0 for size in sizes) and len(sizes) < 14
    for before, after in zip(sizes, sizes[1:]):
        assert after <= max(1.5 * before, before + 64)
    caches.reserve(10_000)
    assert caches.capacity == 10_048
    caches.reserve(20)
    assert caches.capacity == 10_048


def test_growth_stops_at_the_limit():
    caches = _caches()
    caches.reserve(500, limit=560)
    assert caches.capacity == 512
    caches.reserve(513, limit=560)
    assert caches.capacity == 576
    caches.reserve(600, limit=560)  # needed, regardless of the limit
    assert caches.capacity == 640


def test_padding_stays_hidden_and_new_keys_are_seen():
    caches, _ = _taken(3, 70, 70)
    visible = torch.rand(3, 70, generator=torch.Generator().manual_seed(1)) > 0.3
    caches.set_mask(visible)
    caches.reserve(300)
    assert torch.equal(caches.mask[:3, :70], visible)
    assert caches.mask[:, 70:].all() and caches.mask[3:].all() and caches.mask.shape[1] == caches.capacity
    caches.set_mask(visible[:2, :9])
    assert torch.equal(caches.mask[:2, :9], visible[:2, :9]) and caches.mask[2].all() and caches.mask[:, 9:].all()
    caches.set_mask(None)
    assert caches.mask.all()


class _Memory:
    """Replaces ``torch.empty``: poisons memory, counts live bytes, and fails on request."""

    def __init__(self) -> None:
        self.live, self.peak, self.fails_in = 0, 0, None

    def __call__(self, *size, **options) -> torch.Tensor:
        if self.fails_in is not None:
            self.fails_in -= 1
            if self.fails_in < 0:
                raise torch.OutOfMemoryError("no memory")
        out = poisoned_empty(*size, **options)
        self._add(out.nbytes)
        weakref.finalize(out, self._add, -out.nbytes)
        return out

    def _add(self, change: int) -> None:
        self.live += change
        self.peak = max(self.peak, self.live)


@pytest.fixture
def memory(monkeypatch):
    memory = _Memory()
    monkeypatch.setattr(growing_caches.torch, "empty", memory)
    return memory


def _bytes(caches: GrowingCaches) -> int:
    return sum(x.nbytes for x in (*caches.keys, *caches.values))


def test_one_layer_at_most_is_there_twice(memory):
    caches, _ = _taken(4, 100, 100)
    for needed in (150, 1000):
        before, memory.peak = _bytes(caches), 0
        caches.reserve(needed)
        assert memory.live == _bytes(caches) > before
        assert memory.peak <= _bytes(caches) + before // LAYERS


def test_what_is_taken_anew_is_never_there_twice(memory):
    caches, _ = _taken(4, 100, 100)
    memory.peak = 0
    keys, values = _random(2, 300), _random(2, 300, 1)
    for index in range(LAYERS):
        caches.take(index, keys, values, length=300)
    assert memory.peak == memory.live == _bytes(caches)
    _check_content(caches, [(keys, values)] * LAYERS)
    addresses = caches.table.tolist()
    caches.take(1, values[:, :, :50], keys[:, :, :50], length=128)  # the capacity is larger already
    assert caches.table.tolist() == addresses and torch.equal(caches.give(1, 2, 50)[0], values[:, :, :50])


@pytest.mark.parametrize("allocations", range(2 * LAYERS))
def test_growth_that_fails_loses_nothing(memory, allocations):
    """After any failed allocation the table matches the caches, and a retry succeeds."""
    caches, given = _taken(4, 100, 100)
    memory.fails_in = allocations
    with pytest.raises(torch.OutOfMemoryError):
        caches.reserve(400)
    assert caches.capacity == 128
    _check_table(caches)
    _check_content(caches, given)
    memory.fails_in = None
    caches.reserve(400)
    assert caches.capacity == 448
    _check_table(caches)
    _check_content(caches, given)


def test_taking_that_fails_leaves_an_empty_layer(memory):
    caches, given = _taken(4, 100, 100)
    memory.fails_in = 1
    with pytest.raises(torch.OutOfMemoryError):
        caches.take(1, _random(1, 300), _random(1, 300), length=300)
    assert [keys.shape[2] for keys in caches.keys] == [128, 0, 128] and caches.capacity == 0
    _check_table(caches)
    assert torch.equal(caches.give(2, 4, 100)[1], given[2][1])


def test_in_and_out_of_inference_mode():
    with torch.inference_mode():
        caches, given = _taken(2, 10, 10)
        caches.reserve(100)
        caches.set_mask(torch.ones(2, 10, dtype=torch.bool))
    assert not any(
        x.is_inference() or x.requires_grad for x in (*caches.keys, *caches.values, caches.mask, caches.table)
    )
    caches.keys[0].mul_(1.0)
    _check_content(caches, given)
    keys = _random(2, 10).requires_grad_()
    caches.take(0, keys, keys, length=10)
    caches.reserve(300)
    assert not caches.keys[0].requires_grad


def test_given_keys_are_copies():
    caches, given = _taken(2, 10, 10)
    for x in caches.give(1, 2, 10):
        x.fill_(7.0)
    _check_content(caches, given)


def test_what_does_not_fit_is_refused():
    caches = _caches()
    for keys, values, length in (
        (_random(6, 4), _random(6, 4), 4),
        (_random(2, 4), _random(2, 5), 5),
        (_random(2, 9), _random(2, 9), 8),
        (_random(2, 4)[:, :1], _random(2, 4)[:, :1], 4),
        (_random(2, 4)[..., :1], _random(2, 4)[..., :1], 4),
    ):
        with pytest.raises(ValueError, match="keys and values must be"):
            caches.take(0, keys, values, length=length)
    caches.take(0, _random(2, 4), _random(2, 4), length=4)
    for batch, length in ((6, 4), (2, 65)):
        with pytest.raises(ValueError, match="5 rows of 64 positions"):
            caches.give(0, batch, length)


@pytest.mark.parametrize(
    ("dtype", "rows", "heads"),
    [(torch.float16, ROWS, KV_HEADS), (torch.float32, ROWS + 1, KV_HEADS), (torch.float32, ROWS, 1)],
)
def test_a_step_refuses_caches_of_other_sizes(dtype, rows, heads):
    class Layer:
        weights, eps, scale, kv_heads, head_dim = None, 1e-6, 1.0, heads, HEAD_DIM

    with pytest.raises(ValueError, match="caches must be of"):
        decode_step(torch.ones(rows, 1, 8, dtype=dtype), Layer, None, None, _caches(), 0, None, None)


def test_what_is_cleared_is_freed_and_can_be_taken_again():
    caches, _ = _taken(2, 30, 100)
    held = [weakref.ref(x) for x in caches.keys + caches.values]
    caches.clear()
    assert caches.capacity == 0 and not any(reference() is not None for reference in held)
    _check_table(caches)  # a kernel that ran now would neither read nor write freed memory
    given = [(_random(3, 40, seed), _random(3, 40, seed + 10)) for seed in range(LAYERS)]
    for index, (keys, values) in enumerate(given):
        caches.take(index, keys, values, length=41)
    _check_table(caches)
    _check_content(caches, given)
