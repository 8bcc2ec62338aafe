"""RoPE, with keys and values written into a KV cache, by the Triton kernel and by the C++ extension."""

import pytest
import torch

import qvl_kernels
from qvl_kernels import dispatch
from qvl_kernels.ops.rope.op import qk_norm_rope_to_cache_op
from qvl_kernels.ops.rope.reference import qk_norm_rope_reference
from qvl_kernels.testing import GuardedEmpty, assert_close_to_fp64, random_tensor, surrounded

EPS = 1e-6


def _arguments(batch, time, heads, kv_heads, head_dim, capacity, dtype):
    """q, k, v as slices of one projection; KV caches with strided rows."""
    generator = torch.Generator().manual_seed(0)
    counts = [heads, kv_heads, kv_heads]
    fused = random_tensor((batch, time, sum(counts) * head_dim + 5), dtype, generator)
    q, k, v = (
        x.unflatten(-1, (-1, head_dim)) for x in fused[..., 2:-3].split([count * head_dim for count in counts], -1)
    )
    weights = [random_tensor((head_dim,), dtype, generator) for _ in range(2)]
    angles = torch.rand(batch, time, head_dim, generator=generator) * 100
    k_cache, v_cache = random_tensor((2, batch, capacity, kv_heads, head_dim + 7), dtype, generator).transpose(2, 3)[
        ..., 4:-3
    ]
    return [q, k, v, *weights, angles.cos().to(dtype), angles.sin().to(dtype), k_cache, v_cache]


def _expected(q, k, v, q_weight, k_weight, cos, sin, k_cache, v_cache, starts):
    q, k = qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, EPS)
    for row, start in enumerate(starts):
        for t in range(q.shape[1]):
            if 0 <= start + t < k_cache.shape[2]:
                k_cache[row, :, start + t], v_cache[row, :, start + t] = k[row, t], v[row, t]
    return q, k_cache, v_cache


@pytest.mark.parametrize("backend", ["triton", "cpp"])
@pytest.mark.parametrize(
    ("lengths", "past", "time", "capacity"),
    [
        ([7, 0, 19], 0, 1, 20),
        ([3, 16, 0], 1, 3, 20),
        (None, 5, 4, 9),
        ([20, -1, -30], 0, 1, 20),  # outside: nothing may be written there
        ([19, -2, 1 << 30], 0, 3, 20),
        (None, 18, 4, 20),
        ([0, 0, 0], 0, 1, 0),
    ],
    ids=["decode", "several", "prefill", "outside", "partly_outside", "past_the_end", "no_capacity"],
)
def test_to_cache(lengths, past, time, capacity, backend, dtype, device, monkeypatch):
    if backend == "cpp" and not dispatch.backends()["cpp"]["available"]:
        pytest.skip("the C++ extension is not built here")
    arguments = _arguments(3, time, 6, 2, 18, capacity, dtype)
    starts = [past + length for length in lengths or [0, 0, 0]]
    golden = _expected(*(x.double() for x in arguments), starts)
    baseline = _expected(*(x.clone() for x in arguments), starts)
    device = device if backend == "triton" else torch.device("cpu")
    moved = [surrounded(x.to(device)) for x in arguments]
    gaps = [_poisoned_gaps(x) for x in moved[-2:]]
    counts = (
        None if lengths is None else torch.tensor(lengths, dtype=torch.int64 if past else torch.int32, device=device)
    )
    guard = GuardedEmpty()
    monkeypatch.setattr(torch, "empty", guard)
    with torch.no_grad(), qvl_kernels.use_backend(backend):
        q = qk_norm_rope_to_cache_op(*moved, counts, past, EPS)
    monkeypatch.undo()
    guard.check()
    assert gaps == [_poisoned_gaps(x) for x in moved[-2:]]
    for ours, plain, exact in zip((q, *moved[-2:]), baseline, golden):
        assert_close_to_fp64(ours.cpu(), plain, exact)


def _poisoned_gaps(x: torch.Tensor) -> int:
    """Bytes 0xFF around and between the elements of ``x``."""
    memory = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    return int((memory == 0xFF).sum()) - int((x.contiguous().view(torch.uint8) == 0xFF).sum())
