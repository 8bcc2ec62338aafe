"""The attention ops beyond the shared cases: mask shapes, masked values that must not leak, layouts, arguments."""

import math
from collections.abc import Callable

import bounds
import pytest
import torch
from kernel_selection import ISAS

import qvl_kernels
from qvl_kernels.testing import instruction_set, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")
# Query counts and groups on every path: 1 to 4 rows (streamed), one vector of lanes, several panels, tails.
QUERIES = [1, 2, 3, 4, 5, 17, 70]


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _qkv(t: int, s: int, h: int = 4, hkv: int = 2, d: int = 16, *, b: int = 1, dtype=torch.float32, scale: float = 1.0):
    return (
        _randn(b, t, h, d, dtype=dtype, seed=1, scale=scale),
        _randn(b, s, hkv, d, dtype=dtype, seed=2, scale=scale),
        _randn(b, s, hkv, d, dtype=dtype, seed=3),
    )


def _check(q, k, v, **options) -> None:
    """Checks out and lse of each instruction set's kernels against the fp64 reference."""
    judge = _judge(q, k, v, **options)
    for isa in ISAS:
        with qvl_kernels.use_backend("cpp"), instruction_set(isa):
            judge(*qvl_kernels.attention(q, k, v, return_lse=True, **options), isa)


def _judge(q, k, v, **options) -> Callable:
    """Rejects (out, lse) with a large error in one element or small errors in all."""
    q64, k64, v64 = (x.double() for x in (q, k, v))
    doubles = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in options.items()
    }
    with qvl_kernels.use_backend("reference"):
        golden, golden_lse = qvl_kernels.attention(q64, k64, v64, return_lse=True, **doubles)
        magnitude = qvl_kernels.attention(q64, k64, v64.abs(), **doubles)
    # Scores of visible keys are near the lse, so additive masks are not much larger. Beside finfo.min scores vanish in
    # fp64, too.
    added = golden_lse.abs().movedim(-2, -1)[..., None]
    added[added > 1e30] = 0.0
    slack, lse_slack = bounds.attention(q, k, golden, magnitude, q.dtype, scale=options.get("scale"), added=added)
    lse_slack = lse_slack[..., 0].movedim(-1, -2) + 2 * bounds.SINGLE * golden_lse.abs().nan_to_num(posinf=0.0)
    limit = _limit(q, k, options.get("scale"), added)

    def judge(out, lse, what="") -> None:
        bounds.assert_within(f"out {what}", out, golden, slack)
        bounds.assert_within(f"lse {what}", lse, golden_lse, lse_slack)
        assert relative_error(out, golden) <= limit, what
        assert out.dtype == q.dtype and lse.dtype == torch.float32

    return judge


def _limit(q, k, scale=None, added=torch.zeros(())) -> float:
    largest = bounds.largest_scores(q, k, scale) + added
    return bounds.norm_error(q.dtype, k.shape[-3], exponent=float(largest.max()) if largest.numel() else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 515), (70, 70), (2, 130)])
def test_small_faults_are_found(queries, keys, dtype):
    """The bounds of this file detect a missing key and one wrong element."""
    q, k, v = _qkv(queries, keys, dtype=dtype)
    judge, (out, lse) = _judge(q, k, v), qvl_kernels.attention(q, k, v, return_lse=True)
    judge(out, lse)
    for kept in (slice(1, None), slice(keys - 1)):
        fewer, fewer_lse = qvl_kernels.attention(q, k[:, kept], v[:, kept], return_lse=True)
        with pytest.raises(AssertionError, match="relative_error|out"):
            judge(fewer, lse)
        with pytest.raises(AssertionError, match="lse"):
            judge(out, fewer_lse)
    changed = out.clone()
    changed[0, queries // 2, 2, 5] += out.abs().median()
    with pytest.raises(AssertionError, match="out : 1 of"):
        judge(changed, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 3, 128, 130, 515])
@pytest.mark.parametrize("queries", QUERIES)
def test_causal_is_aligned_to_the_last_key(queries, keys, dtype):
    _check(*_qkv(queries, keys, dtype=dtype), causal=True)


def test_causal_mask_drawn():
    q, k = torch.zeros(1, 2, 1, 4), torch.zeros(1, 4, 1, 4)
    v = torch.eye(4)[None, :, None]  # the output is the probabilities
    out = qvl_kernels.attention(q, k, v, causal=True)[0, :, 0]
    torch.testing.assert_close(out, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0], [1 / 4] * 4]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1), (24, 1)])
@pytest.mark.parametrize("queries", [1, 3, 9])
def test_grouped_heads(queries, heads, kv_heads, dtype):
    _check(*_qkv(queries, 150, heads, kv_heads, 24, b=2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 2, 5, 20, 33, 72, 80, 96, 130, 511, 512])
@pytest.mark.parametrize("queries", [1, 2, 20])
def test_head_dims(queries, head_dim, dtype):
    _check(*_qkv(queries, 37, 8, 4, head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_sequences_of_every_length(causal, dtype):
    lengths = [0, 1, 2, 3, 4, 5, 0, 0, 16, 129, 1, 0]
    n = sum(lengths)
    q, k, v = (x[0] for x in _qkv(n, n, dtype=dtype))
    _check(q, k, v, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[301, 2, 0, 259, 1, 64], [577]], ids=str)
def test_heads_of_many_query_blocks(lengths, causal, dtype):
    """bf16: strided keys and values are gathered once for all query blocks. Odd lengths, and blocks of so few queries
    that they read them in place.
    """
    n = sum(lengths)
    q, k, v = _randn(n, 3, 4, 24, dtype=dtype).unbind(1)
    _check(q, k, v, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(), causal=causal)


@pytest.mark.parametrize("counts", [[515, 0], [514, 77]], ids=str)
def test_key_lengths_under_many_query_blocks(counts):
    q, k, v = (x.clone() for x in _qkv(300, 515, b=2, dtype=torch.bfloat16))
    for row, count in enumerate(counts):
        k[row, count:], v[row, count:] = NAN, NAN
    out = qvl_kernels.cross_attention(q, k, v, kv_lens=torch.tensor(counts))
    for row, count in enumerate(counts):
        alone = qvl_kernels.cross_attention(q[row : row + 1], k[row : row + 1, :count], v[row : row + 1, :count])
        assert torch.equal(out[row : row + 1], alone) and alone.isfinite().all()


def test_thousands_of_varlen_sequences():
    lengths = torch.arange(5000) % 4
    n = int(lengths.sum())
    q, k, v = (x[0] for x in _qkv(n, n, 2, 2, 8))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    out = qvl_kernels.attention(q, k, v, cu_seqlens=bounds)
    same = torch.repeat_interleave(torch.arange(5000), lengths)
    mask = (same[:, None] == same[None])[None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x[None].transpose(1, 2) for x in (q, k, v)), attn_mask=mask
    )
    torch.testing.assert_close(out, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("kind", ["bool", "additive", "padding"])
def test_rows_that_see_nothing_are_zero(kind, queries):
    q, k, v = _qkv(queries, 9, b=2)
    hidden = torch.zeros(2, 1, queries, 9, dtype=torch.bool)
    hidden[0, :, queries // 2] = True
    if kind == "padding":
        options = {"key_padding_mask": torch.tensor([[False] * 9, [True] * 9])}
        empty = torch.tensor([[True], [False]]).expand(2, queries)
    else:
        mask = ~hidden if kind == "bool" else torch.zeros(hidden.shape).masked_fill(hidden, -INF)
        options, empty = {"mask": mask}, hidden[:, 0, :, 0]
    out, lse = qvl_kernels.attention(q, k, v, return_lse=True, **options)
    assert (out[empty] == 0).all() and out.isfinite().all()
    assert torch.equal(lse == -INF, empty[:, None].expand_as(lse))
    _check(q, k, v, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("queries", QUERIES)
def test_padding_may_hold_anything(queries, bad, dtype):
    q, k, v = _qkv(queries, 140, b=2, dtype=dtype)
    visible = torch.ones(2, 140, dtype=torch.bool)
    visible[0, :3] = visible[0, 60:63] = visible[1, 101:] = False
    clean = qvl_kernels.attention(q, k, v, key_padding_mask=visible)
    k[~visible], v[~visible] = bad, bad
    assert torch.equal(qvl_kernels.attention(q, k, v, key_padding_mask=visible), clean)
    lengths = torch.tensor([140, 101])
    prefix = torch.arange(140)[None] < lengths[:, None]
    both = visible & prefix
    crossed = qvl_kernels.cross_attention(q, k, v, kv_lens=lengths, key_padding_mask=visible)
    torch.testing.assert_close(crossed, qvl_kernels.attention(q, k, v, key_padding_mask=both), rtol=0, atol=0)
    if queries > 4:
        return
    k, v = k.masked_fill(~visible[..., None, None], 0), v.masked_fill(~visible[..., None, None], 0)
    k[1, 101:], v[1, 101:] = bad, bad  # behind the length of a cache
    cached = [x.transpose(1, 2).contiguous() for x in (k, v)]
    out = qvl_kernels.decode_attention(q, *cached, lengths=lengths)
    alone = [x[1:, :101] for x in (q, k, v)]
    assert relative_error(out[1:], qvl_kernels.attention(*alone, causal=True)) <= 2 * _limit(*alone[:2])


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_visible_nan_is_not_hidden(place, queries):
    tensors = dict(zip("qkv", _qkv(queries, 140, 2, 2)))
    tensors[place][0, 0, 0] = NAN
    out = qvl_kernels.attention(**tensors)
    assert out[0, 0, 0].isnan().all() and out[0, :, 1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 4, 33])
def test_huge_scores(queries, dtype):
    _check(*_qkv(queries, 140, dtype=dtype, scale=60.0))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
@pytest.mark.parametrize("queries", [2, 33])
def test_scale(queries, scale):
    _check(*_qkv(queries, 140), scale=scale)
    _check(*_qkv(queries, 140), scale=scale, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 135), (2, 1, 1, 135), (1, 4, 1, 135), (2, 4, 0, 135), (2, 1, 0, 1), (1, 1, 0, 135)]
)
@pytest.mark.parametrize("queries", [1, 4, 18])
def test_masks_broadcast(queries, shape, dtype):
    shape = tuple(queries if size == 0 else size for size in shape)
    q, k, v = _qkv(queries, 135, b=2, dtype=dtype)
    _check(q, k, v, mask=_randn(*shape, dtype=dtype, seed=4))
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.4
    _check(q, k, v, mask=visible, causal=True)
    _check(q, k, v, mask=torch.zeros(shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min))


def test_mask_strides():
    q, k, v = _qkv(20, 135)
    mask = torch.rand(1, 4, 135, 20, generator=torch.Generator().manual_seed(5)) > 0.4
    for turned in (mask.transpose(2, 3), mask[:, :, ::5].repeat(1, 1, 5, 1).transpose(2, 3)):
        _check(q, k, v, mask=turned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_layouts_agree(queries, dtype):
    q, k, v = _qkv(queries, 200, b=2, d=20, dtype=dtype)
    expected = qvl_kernels.attention(q, k, v, causal=True)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(qvl_kernels.attention(*turned, causal=True), expected)
    wide = [torch.full((*x.shape[:3], 27), NAN, dtype=dtype) for x in (q, k, v)]
    for buffer, x in zip(wide, (q, k, v)):
        buffer[..., 3:23] = x
    assert torch.equal(qvl_kernels.attention(*(x[..., 3:23] for x in wide), causal=True), expected)


@pytest.mark.parametrize("queries", [1, 2, 12])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_splits_over_keys(threads, queries):
    q, k, v = _qkv(queries, 4100, 2, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _check(q, k, v, causal=True)
        _check(q, k, v, mask=torch.arange(4100)[None, None, None] < 700)  # later splits have no visible keys
        _check(q, k, v, mask=torch.zeros(1, 1, 1, 4100, dtype=torch.bool))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("b", "t", "s"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty(b, t, s, dtype):
    q, k, v = _qkv(t, s, b=b, dtype=dtype)
    out, lse = qvl_kernels.attention(q, k, v, return_lse=True)
    assert out.shape == q.shape and (out == 0).all()
    assert lse.shape == (b, 4, t) and (lse == -INF).all()
    assert torch.equal(qvl_kernels.cross_attention(q, k, v), out)


def test_lse():
    q, k, v = _qkv(6, 11)
    lse = qvl_kernels.attention(q, k, v, return_lse=True)[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / math.sqrt(16)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_gradient_of_lse_and_of_padding():
    q, k, v = (x.double() for x in _qkv(6, 11))
    visible = torch.arange(11)[None] < 8

    def gradients(function, tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out, lse = function(*tensors, key_padding_mask=visible, causal=True, return_lse=True)
        return torch.autograd.grad(out.square().sum() + lse[lse > -INF].sum(), tensors)

    with qvl_kernels.use_backend("reference"):
        expected = gradients(qvl_kernels.attention, (q, k, v))
    singles = [x.float() for x in (q, k, v)]
    singles[1][:, 8:], singles[2][:, 8:] = NAN, INF
    for ours, exact in zip(gradients(qvl_kernels.attention, singles), expected):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 20000, 1, 8), torch.ones(1, 20000, 1, 8)
    with qvl_kernels.use_backend("reference"):
        out = qvl_kernels.attention(q, k, v, dropout_p=0.3)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 4, 6])
def test_decode_reads_no_more_than_the_lengths(queries, dtype):
    lengths = torch.tensor([queries, 513, 700])
    q = _randn(3, queries, 4, 32, dtype=dtype)
    caches = [torch.full((3, 2, 720, 32), NAN, dtype=dtype) for _ in range(2)]
    for b, length in enumerate(lengths.tolist()):
        for seed, cache in enumerate(caches):
            cache[b, :, :length] = _randn(2, length, 32, dtype=dtype, seed=seed)
    out = qvl_kernels.decode_attention(q, *caches, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        k, v = (cache[b : b + 1, :, :length].transpose(1, 2) for cache in caches)
        with qvl_kernels.use_backend("reference"):
            golden = qvl_kernels.attention(q[b : b + 1].double(), k.double(), v.double(), causal=True)
        assert relative_error(out[b : b + 1], golden) <= _limit(q, k)


def test_decode_refuses_gradients():
    q, cache = torch.randn(1, 1, 2, 8, requires_grad=True), torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError, match="no backward"):
        qvl_kernels.decode_attention(q, cache, cache, lengths=5)


Q, KV = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8)
VARLEN = torch.zeros(6, 2, 8)
BAD = {
    "heads": ({"q": Q[:, :, :3]}, ValueError, "multiple"),
    "head_dim": ({"q": Q[..., :4]}, ValueError, "head_dim"),
    "batch": ({"q": Q[:1]}, ValueError, "batch"),
    "dtype": ({"q": Q.half()}, (TypeError, ValueError), "dtype"),
    "values": ({"v": KV[:, :4]}, ValueError, "v"),
    "strided": ({"q": torch.zeros(2, 3, 4, 16)[..., ::2]}, ValueError, "contiguous"),
    "rank": ({"q": Q[0]}, ValueError, "q"),
    "padding_dtype": ({"key_padding_mask": torch.ones(2, 5)}, TypeError, "bool"),
    "padding_shape": ({"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "key_padding_mask"),
    "mask_shape": ({"mask": torch.ones(2, 1, 3, 4)}, ValueError, "broadcast"),
    "mask_dtype": ({"mask": torch.ones(2, 1, 3, 5).half()}, TypeError, "mask"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p"),
}
BAD_BOUNDS = {
    "start": torch.tensor([1, 6]),
    "end": torch.tensor([0, 7]),
    "falling": torch.tensor([0, 5, 3, 6]),
    "negative": torch.tensor([0, -1, 6]),
    "none": torch.tensor([]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        qvl_kernels.attention(**{"q": Q, "k": KV, "v": KV, **change})


@pytest.mark.parametrize("name", BAD_BOUNDS)
def test_bad_cu_seqlens(name):
    with pytest.raises(ValueError, match="cu_seqlens"):
        qvl_kernels.attention(VARLEN, VARLEN, VARLEN, cu_seqlens=BAD_BOUNDS[name].int())
    with pytest.raises(TypeError, match="int32"):
        qvl_kernels.attention(VARLEN, VARLEN, VARLEN, cu_seqlens=torch.tensor([0, 6]))


@pytest.mark.parametrize("lengths", [0, 6, -1, torch.tensor([5, 6]), torch.tensor([0, 5])])
def test_bad_lengths(lengths):
    cache = KV.transpose(1, 2).contiguous()
    with pytest.raises(ValueError, match="lengths"):
        qvl_kernels.decode_attention(Q[:, :1], cache, cache, lengths=lengths)
    if isinstance(lengths, torch.Tensor) and lengths.max() > 5:
        with pytest.raises(ValueError, match="kv_lens"):
            qvl_kernels.cross_attention(Q, KV, KV, kv_lens=lengths)


@pytest.mark.parametrize("which", ["k_cache", "v_cache"])
def test_int8_caches_whose_rows_overlap(which):
    generator = torch.Generator().manual_seed(0)
    caches = {
        name: torch.randint(-100, 100, (2, 2, 5, 8), generator=generator).to(torch.int8)
        for name in ("k_cache", "v_cache")
    }
    caches[which] = caches[which].as_strided((2, 2, 5, 8), (1, 1, 1, 1))
    scales = {name: torch.rand(2, 2, 5, generator=generator) * 0.02 + 0.001 for name in ("k_scale", "v_scale")}
    q = torch.randn(2, 3, 4, 8, generator=generator)
    out = qvl_kernels.decode_attention(q, *caches.values(), lengths=5, **scales)
    dense = qvl_kernels.decode_attention(q, *(x.contiguous() for x in caches.values()), lengths=5, **scales)
    assert torch.equal(out, dense)
