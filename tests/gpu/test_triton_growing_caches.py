"""Kernels recorded once, as by a CUDA graph, and replayed while their KV caches grow: bit-identical to caches of fixed
size.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map

import qvl_kernels
from qvl_kernels.gpu import launch as gpu_launch
from qvl_kernels.gpu.device import SM_COUNT
from qvl_kernels.ops.decode_attention import decode_attention, tiles
from qvl_kernels.ops.decode_attention.op import decode_attention_op
from qvl_kernels.ops.decoder_layer.decode_step import cross_attention_step, decode_step
from qvl_kernels.ops.decoder_layer.growing_caches import GrowingCaches
from qvl_kernels.ops.decoder_layer.parts import linear_residual, linear_swiglu, norm_linears
from qvl_kernels.ops.rope.op import qk_norm_rope_to_cache_op
from qvl_kernels.testing import poisoned_empty, random_tensor

ROOM = 256


@pytest.fixture(autouse=True)
def _few_splits(monkeypatch):
    """Fixes small blocks for every capacity: the interpreter is slow, and another order of sums changes the bits."""
    plain = tiles.decode_attention
    monkeypatch.setattr(
        tiles, "decode_attention", lambda *args: {**plain(*args), "SPLITS": 4, "BLOCK_N": 32, "COMBINE_STEP": 2}
    )


class _Model:
    """Growing caches beside fixed ones of the same content, NaN in unwritten slots, and the buffers that recorded
    launches read.
    """

    def __init__(self, layers, rows, kv_heads, head_dim, dtype, device) -> None:
        self.generator = torch.Generator().manual_seed(rows)
        self.dtype, self.device, self.rows, self.kv_heads, self.head_dim = dtype, device, rows, kv_heads, head_dim
        self.caches = GrowingCaches(layers, rows, kv_heads, head_dim, dtype, device)
        self.fixed = [
            [torch.full((rows, kv_heads, ROOM, head_dim), torch.nan, dtype=dtype, device=device) for _ in range(2)]
            for _ in range(layers)
        ]
        self.mask = torch.ones(rows, ROOM, dtype=torch.bool, device=device)
        self.mask[:, :40] = (torch.rand(rows, 40, generator=self.generator) > 0.3).to(device)
        self.lengths, self.cache_seqlens = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        self.length, self.buffers = 0, []

    def buffer(self, *shape: int) -> torch.Tensor:
        self.buffers.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
        return self.buffers[-1]

    def rand(self, *shape: int) -> torch.Tensor:
        return random_tensor(shape, self.dtype, self.generator).to(self.device)

    def go_on(self, length: int) -> None:
        """Rows of length, 5 and 0 keys with room for another one each, and new contents of the buffers."""
        for index, fixed in enumerate(self.fixed):
            new = [self.rand(self.rows, self.kv_heads, length - self.length, self.head_dim) for _ in range(2)]
            if self.length == 0:
                self.caches.take(index, *new, length=length + 1)
            self.caches.reserve(length + 1)
            for ours, plain, part in zip((self.caches.keys[index], self.caches.values[index]), fixed, new):
                ours[:, :, self.length : length], plain[:, :, self.length : length] = part, part
        if self.length == 0:
            self.caches.set_mask(self.mask[:, :40])
        self.length = length
        self.lengths.copy_(torch.tensor([length, 5, 0][: self.rows]))
        self.cache_seqlens.copy_(self.lengths + 1)
        for buffer in self.buffers:
            buffer.copy_(self.rand(*buffer.shape))

    def check_caches(self) -> None:
        for index, fixed in enumerate(self.fixed):
            for ours, plain in zip(self.caches.give(index, self.rows, self.caches.capacity), fixed):
                assert torch.equal(ours.nan_to_num(), plain[:, :, : self.caches.capacity].nan_to_num())


def _replay(launches: list[gpu_launch.Launch]) -> None:
    for launch in launches:
        gpu_launch.launch(launch.kernel, launch.grid, **launch.arguments)


@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim"), [(3, 6, 3, 10), (1, 5, 1, 64)], ids=str)
def test_recorded_attention_outlives_growth(rows, heads, kv_heads, head_dim, dtype, device, monkeypatch):
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    model = _Model(2, rows, kv_heads, head_dim, dtype, device)
    caches, scale, outs = model.caches, head_dim**-0.5, []
    inputs = [[model.buffer(rows, 1, count, head_dim) for count in (heads, kv_heads, kv_heads)] for _ in range(2)]
    tables = [
        model.buffer(head_dim),
        model.buffer(head_dim),
        model.buffer(rows, 1, head_dim),
        model.buffer(rows, 1, head_dim),
    ]
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        with gpu_launch.record() as launches:  # before any capacity
            for (q, k, v), keys, values, entry in zip(inputs, caches.keys, caches.values, caches.entries):
                q = qk_norm_rope_to_cache_op(q, k, v, *tables, keys, values, model.lengths, 0, 1e-6, entry)
                outs.append(decode_attention_op(q, keys, values, model.cache_seqlens, None, None, None, scale, entry))
        for length, capacity in ((61, 64), (64, 128), (150, 192)):
            model.go_on(length)
            assert caches.capacity == capacity
            _replay(launches)
            for (q, k, v), fixed, out in zip(inputs, model.fixed, outs):
                q = qk_norm_rope_to_cache_op(q, k, v, *tables, *fixed, model.lengths, 0, 1e-6)
                expected = decode_attention(
                    q, *fixed, lengths=model.cache_seqlens, mask=model.mask[:, None, None], scale=scale
                )
                assert torch.equal(out, expected) and out.isfinite().all() and out.any()
            model.check_caches()


def test_a_recorded_step_outlives_growth(dtype, device, monkeypatch):
    """A whole layer; small, since the interpreter is slow at matmuls."""
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    rows, heads, kv_heads, head_dim, hidden, mlp, eps = 2, 2, 1, 4, 8, 6, 1e-6
    model = _Model(1, rows, kv_heads, head_dim, dtype, device)

    def matrix(n, k):
        return model.rand(n, k) * k**-0.5

    w = qvl_kernels.DecoderWeights(
        model.rand(hidden),
        matrix(heads * head_dim, hidden),
        matrix(kv_heads * head_dim, hidden),
        matrix(kv_heads * head_dim, hidden),
        model.rand(head_dim),
        model.rand(head_dim),
        matrix(hidden, heads * head_dim),
        model.rand(hidden),
        matrix(mlp, hidden),
        matrix(mlp, hidden),
        matrix(hidden, mlp),
    )
    layer = SimpleNamespace(weights=w, num_heads=heads, kv_heads=kv_heads, head_dim=head_dim, eps=eps, scale=0.5)
    x, cos, sin = model.buffer(rows, 1, hidden), model.buffer(rows, 1, head_dim), model.buffer(rows, 1, head_dim)
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        with gpu_launch.record() as launches:
            out = decode_step(x, layer, cos, sin, model.caches, 0, model.lengths, model.cache_seqlens)
        for length in (63, 100):
            model.go_on(length)
            _replay(launches)
            q, k, v = (
                y.view(rows, 1, -1, head_dim) for y in norm_linears(x, w.input_norm, eps, [w.q, w.k, w.v], [None] * 3)
            )
            q = qk_norm_rope_to_cache_op(q, k, v, w.q_norm, w.k_norm, cos, sin, *model.fixed[0], model.lengths, 0, eps)
            attended = decode_attention(
                q, *model.fixed[0], lengths=model.cache_seqlens, mask=model.mask[:, None, None], scale=0.5
            )
            y = linear_residual(x, attended.view(rows, 1, -1), w.o, None)
            expected = linear_residual(y, linear_swiglu(y, w.post_norm, eps, w.gate, w.up), w.down, None)
            assert torch.equal(out, expected) and out.isfinite().all() and out.any()
            model.check_caches()


def test_recorded_cross_attention_reads_whatever_is_there(dtype, device, monkeypatch):
    """Images of other sizes, fewer rows, and none; bit-identical to attention over separate tensors."""
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    rows, heads, kv_heads, head_dim = 4, 6, 3, 10
    model = _Model(1, rows, kv_heads, head_dim, dtype, device)
    q, caches = model.buffer(rows, 1, heads, head_dim), model.caches
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        with gpu_launch.record() as launches:
            out = cross_attention_step(q, caches, 0, model.lengths, 0.5)
        for batch, size, lengths in (
            (4, 40, [40, 0, 17, 1]),
            (3, 130, [130, 129, 0, 0]),
            (1, 3, [3, 0, 0, 0]),
            (0, 0, [0, 0, 0, 0]),
        ):
            keys, values = (model.rand(batch, kv_heads, size, head_dim) for _ in range(2))
            caches.clear()
            caches.take(0, keys, values, length=size)
            model.lengths.copy_(torch.tensor(lengths))
            q.copy_(model.rand(*q.shape))
            _replay(launches)
            for row, length in enumerate(lengths):
                if length:
                    one = (x[row : row + 1] for x in (q, keys, values))
                    assert (
                        torch.equal(out[row : row + 1], decode_attention(*one, lengths=length, scale=0.5))
                        and out[row].any()
                    )
                else:
                    assert not out[row].any()
        with pytest.raises(ValueError, match="do not fit q"):
            cross_attention_step(q[:2], caches, 0, model.lengths, 0.5)


def test_lengths_beyond_the_capacity(device, monkeypatch):
    """Nothing is written beyond the capacity, and all keys within it are visible; a negative length writes and sees
    none.
    """
    monkeypatch.setattr(torch, "empty", poisoned_empty)  # of 4 splits 64 keys use 2
    rows, kv_heads, head_dim, dtype = 5, 2, 16, torch.float16
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return random_tensor(shape, dtype, generator).to(device)

    caches = GrowingCaches(1, rows, kv_heads, head_dim, dtype, device)
    keys, values = rand(rows, kv_heads, 64, head_dim), rand(rows, kv_heads, 64, head_dim)
    caches.take(0, keys, values, length=64)
    visible = (torch.rand(rows, 64, generator=generator) > 0.3).to(device)
    caches.set_mask(visible)
    lengths = torch.tensor([64, 63, -1, 2**31 - 2, 70], dtype=torch.int32, device=device)
    q, k, v = (rand(rows, 1, heads, head_dim) for heads in (4, kv_heads, kv_heads))
    norm, cos, sin = rand(head_dim), *rand(2, rows, 1, head_dim)
    stale = torch.empty(rows, kv_heads, 0, head_dim, dtype=dtype, device=device)
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        turned = qk_norm_rope_to_cache_op(
            q, k, v, norm, norm, cos, sin, stale, stale, lengths, 0, 1e-6, caches.entries[0]
        )
        out = decode_attention_op(turned, stale, stale, lengths + 1, None, None, None, 0.25, caches.entries[0])
        expected_keys, expected_values = keys.clone(), values.clone()
        expected_turned = qk_norm_rope_to_cache_op(
            q, k, v, norm, norm, cos, sin, expected_keys, expected_values, lengths, 0, 1e-6
        )
        expected = decode_attention(
            q=turned,
            k_cache=expected_keys,
            v_cache=expected_values,
            lengths=64,
            mask=visible[:, None, None],
            scale=0.25,
        )
    expected[2] = 0.0
    new_keys, new_values = caches.give(0, rows, 64)
    assert torch.equal(turned, expected_turned) and torch.equal(out, expected)
    assert torch.equal(new_keys, expected_keys) and torch.equal(new_values, expected_values)
    changed = (new_keys != keys).any(-1).any(1)
    assert changed[1, 63] and changed.sum() == 1


def test_launches_do_not_depend_on_the_capacity(device, monkeypatch):
    """Neither grids nor arguments change, since a CUDA graph holds both."""
    monkeypatch.undo()
    q, lengths, recorded = torch.zeros(2, 1, 4, 16, device=device), torch.ones(2, dtype=torch.int32, device=device), []
    caches = GrowingCaches(1, 2, 2, 16, torch.float32, device)
    for needed in (0, 64, 10_000):
        caches.reserve(needed)
        with torch.no_grad(), qvl_kernels.use_backend("triton"), gpu_launch.record() as launches:
            decode_attention_op(q, caches.keys[0], caches.values[0], lengths, None, None, None, 0.25, caches.entries[0])
            norm, table = q[0, 0, 0], q[:, :, 0]
            heads = q[:, :, :2]
            qk_norm_rope_to_cache_op(
                q,
                heads,
                heads,
                norm,
                norm,
                table,
                table,
                caches.keys[0],
                caches.values[0],
                lengths,
                0,
                1e-6,
                caches.entries[0],
            )
        memory = {x.data_ptr() for x in (caches.keys[0], caches.values[0], caches.mask)} - {0}
        assert len(launches) == 3 and not any(
            x.data_ptr() in memory for launch in launches for x in gpu_launch.tensors(launch.arguments.values())
        )
        recorded.append(
            [
                (launch.kernel, launch.grid, tree_map(lambda x: None if torch.is_tensor(x) else x, launch.arguments))
                for launch in launches
            ]
        )
    assert recorded[0] == recorded[1] == recorded[2]


def test_splits_are_those_of_long_caches(monkeypatch):
    monkeypatch.undo()
    for arch in SM_COUNT:
        for rows in (1, 8, 64, 512):
            for head_dim in (64, 128, 256):
                growing, long = (
                    tiles.decode_attention(8 * rows, 2, head_dim, 2, capacity, arch) for capacity in (None, 1 << 20)
                )
                assert growing == long
