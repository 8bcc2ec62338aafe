"""Flash attention beyond the shared cases: block borders, lengths out of range, NaN in masked places, strides, dropout,
determinism.
"""

import math

import pytest
import torch
from op_cases import differentiable, double, outputs

import qvl_kernels
from qvl_kernels import config
from qvl_kernels.gpu.device import SHARED_MEMORY, SM_COUNT
from qvl_kernels.ops.attention import tiles
from qvl_kernels.ops.attention.op import attention_backward_op, attention_op
from qvl_kernels.testing import GuardedEmpty, assert_close_to_fp64, random_tensor, relative_error, surrounded

NAN, INF = float("nan"), float("inf")


def _slow(*values):
    """Parameters that are slow in the interpreter."""
    return [pytest.param(value, marks=[pytest.mark.slow] if config.interpreted() else []) for value in values]


def _rand(*shape: int, dtype=torch.float16, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return random_tensor(shape, dtype, torch.Generator().manual_seed(seed), scale=scale)


def _qkv(b=1, t=20, s=20, h=2, hkv=1, d=16, dtype=torch.float16, scale: float = 1.0) -> dict:
    return {
        "q": _rand(b, t, h, d, dtype=dtype, seed=1, scale=scale),
        "k": _rand(b, s, hkv, d, dtype=dtype, seed=2, scale=scale),
        "v": _rand(b, s, hkv, d, dtype=dtype, seed=3),
    }


def _varlen(lengths: list[int], h=2, hkv=1, d=16, dtype=torch.float16) -> dict:
    n = sum(lengths)
    arguments = {name: x[0] for name, x in _qkv(1, n, n, h, hkv, d, dtype).items()}
    return {**arguments, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16 and 32, so that short sequences cross block borders; the shared cases use the device's tiles."""
    for name, tile in (
        ("attention", (32, 16)),
        ("attention_backward_queries", (16, 32)),
        ("attention_backward_keys", (32, 16)),
    ):
        plain = getattr(tiles, name)
        monkeypatch.setattr(
            tiles,
            name,
            lambda *args, plain=plain, tile=tile: {
                **plain(*args),
                "BLOCK_M": tile[0],
                "BLOCK_N": tile[1],
                "num_stages": 1,
            },
        )


def _check(arguments: dict, device, monkeypatch, *, function=None) -> None:
    """Checks outputs (lse included) and their gradients against the fp64 reference, and that writes stay inside."""
    function = function or (lambda **x: qvl_kernels.attention(**x, return_lse=True))

    def run(x: dict) -> tuple[list, list]:
        x = differentiable(x)
        out = outputs(function(**x))
        seen = [torch.where(o > -INF, o, 0.0) for o in out]  # rows without visible keys have lse -inf
        cotangents = [_rand(*o.shape, seed=5, dtype=torch.float32).to(o) for o in out]
        inputs = [value for value in x.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        gradients = torch.autograd.grad(sum((o * c).sum() for o, c in zip(seen, cotangents)), inputs)
        return [o.detach() for o in out], list(gradients)

    with qvl_kernels.use_backend("reference"):
        golden, plain = run(double(arguments)), run(arguments)
    moved = {name: surrounded(x.to(device)) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    guard = GuardedEmpty()
    with monkeypatch.context() as patch, qvl_kernels.use_backend("triton"):
        patch.setattr(torch, "empty", guard)
        ours = run(moved)
    guard.check()
    for factor, out, baseline, exact in zip((2.0, 3.0), ours, plain, golden):
        for a, b, c in zip(out, baseline, exact, strict=True):
            assert torch.equal(a.cpu() == -INF, c == -INF)
            finite = c > -INF
            assert_close_to_fp64(a.cpu()[finite], b[finite], c[finite], factor=factor)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 33), (33, 1), (40, 71), *_slow((16, 32), (17, 15), (71, 40))], ids=str)
def test_borders_of_blocks(lengths, causal, device, monkeypatch):
    _check({**_qkv(t=lengths[0], s=lengths[1]), "causal": causal}, device, monkeypatch)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[0], [0, 0, 1, 0], [15, 17, 0, 33], *_slow([16, 16], [1] * 20, [70])], ids=str)
def test_varlen_lengths(lengths, causal, device, monkeypatch):
    _check({**_varlen(lengths), "causal": causal}, device, monkeypatch)


@pytest.mark.parametrize("d", [72, 80, 256, *_slow(16, 96, 128)])
def test_head_sizes(d, dtype, device, monkeypatch):
    _check({**_qkv(t=18, s=19, d=d, dtype=dtype), "causal": True}, device, monkeypatch)


@pytest.mark.parametrize("heads", [(6, 2), *_slow((5, 1), (3, 3))], ids=str)
def test_groups(heads, dtype, device, monkeypatch):
    _check({**_qkv(b=2, t=18, s=33, h=heads[0], hkv=heads[1], dtype=dtype), "causal": True}, device, monkeypatch)


@pytest.mark.parametrize("scale", [0.0, -0.3, *_slow(2.0)])
@pytest.mark.parametrize("causal", [False, *_slow(True)])
def test_scale(scale, causal, device, monkeypatch):
    _check({**_qkv(t=20, s=37), "causal": causal, "scale": scale}, device, monkeypatch)


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 37), (1, 2, 1, 37), (2, 1, 20, 37), *_slow((1, 1, 1, 37), (2, 2, 20, 1), (1, 1, 1, 1))], ids=str
)
def test_masks_broadcast(kind, shape, device, monkeypatch):
    """Gradients are summed over the broadcast dimensions; -inf masks a key."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3
    if kind == "additive":
        mask = torch.where(mask, _rand(*shape), torch.tensor(-INF, dtype=torch.float16))
    _check({**_qkv(b=2, t=20, s=37), "mask": mask, "causal": shape[2] == 1}, device, monkeypatch)


def test_strided_masks(device, monkeypatch):
    mask = torch.rand(1, 2, 37, 20, generator=torch.Generator().manual_seed(3)) > 0.3
    _check({**_qkv(b=2, t=20, s=37), "mask": mask.transpose(2, 3)}, device, monkeypatch)
    _check({**_qkv(b=2, t=20, s=37), "mask": _rand(1, 37, 20, 2).permute(0, 3, 2, 1)}, device, monkeypatch)


def test_masks_as_large_as_the_dtype(device, monkeypatch):
    """Rows whose keys are all masked with the lowest number attend to all equally: an lse of -3e38 cannot hold their
    number.
    """
    mask = torch.zeros(1, 1, 20, 37).masked_fill(
        torch.rand(1, 1, 20, 37, generator=torch.Generator().manual_seed(3)) > 0.5, torch.finfo(torch.float32).min
    )
    mask[:, :, 3:9] = torch.finfo(torch.float32).min
    _check({**_qkv(t=20, s=37, dtype=torch.float32), "mask": mask}, device, monkeypatch, function=qvl_kernels.attention)


@pytest.mark.parametrize("bad", [NAN, *_slow(INF)])
@pytest.mark.parametrize("how", ["padding", "rows", "additive", "lengths", "varlen"])
def test_unseen_keys_may_hold_anything(how, bad, device, monkeypatch):
    """Padding by mask or length, and neighbouring varlen sequences, may be NaN: results and gradients are those with
    finite numbers.
    """
    if how == "varlen":
        arguments = _varlen([13, 40, 20])
        bounds = arguments["cu_seqlens"].tolist()
        hidden = torch.zeros(73, dtype=torch.bool)
        hidden[bounds[1] : bounds[2]] = True
        rows = ~hidden
    else:
        arguments = _qkv(b=2, t=20, s=45)
        hidden = torch.zeros(2, 45, dtype=torch.bool)
        hidden[0, 30:] = hidden[1, 40:] = True
        if how != "lengths":
            hidden[0, :17] = hidden[0, 20] = True
        rows = slice(None)
    visible = ~hidden
    seen_mask = visible[:, None, None] if how != "varlen" else None
    function = qvl_kernels.attention
    if how == "padding":
        arguments["key_padding_mask"] = visible
    elif how == "rows":
        arguments["mask"] = seen_mask & torch.ones(20, 45, dtype=torch.bool).tril(25)
    elif how == "additive":
        arguments["mask"] = torch.zeros(2, 1, 20, 45, dtype=torch.float16).masked_fill(~seen_mask, -INF)
    elif how == "lengths":
        arguments["kv_lens"], function = visible.sum(1), qvl_kernels.cross_attention

    def run(x: dict) -> list[torch.Tensor]:
        x = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in x.items()}
        x = {name: value.detach().requires_grad_() if name in "qkv" else value for name, value in x.items()}
        with qvl_kernels.use_backend("triton"):
            out = function(**x)
            return [out[rows], *torch.autograd.grad(out[rows].float().square().sum(), [x[name] for name in "qkv"])]

    clean = run(arguments)
    spoiled = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    spoiled["k"][hidden], spoiled["v"][hidden] = bad, bad
    if how == "varlen":
        spoiled["q"][hidden] = bad
    for a, b in zip(run(spoiled), clean):
        if how == "varlen" and a.shape[0] == 73:
            a, b = a[rows], b[rows]
        assert torch.equal(a, b) and bool(a.isfinite().all())


def test_visible_nan_is_not_hidden(device):
    for name in "qkv":
        arguments = {key: x.to(device) for key, x in _qkv(s=40).items()}
        arguments[name][0, 0, 0] = NAN
        with torch.no_grad(), qvl_kernels.use_backend("triton"):
            assert qvl_kernels.attention(**arguments)[0, 0, 0].isnan().all()


def test_strided_everything(device, monkeypatch):
    """Heads out of a fused projection, keys of a transposed cache, gaps between rows; the gradient of the output
    strided as well.
    """
    wide = _rand(2, 20, 2, 3 * 16, seed=4)
    arguments = {
        "q": wide[..., 16:32],
        "k": _rand(2, 1, 40, 16, seed=5).transpose(1, 2),
        "v": _rand(2, 44, 1, 16, seed=6)[:, 2:42],
        "causal": True,
    }
    _check(arguments, device, monkeypatch, function=lambda **x: qvl_kernels.attention(**x).transpose(1, 2)[:, :, ::2])
    _check(arguments, device, monkeypatch, function=lambda **x: qvl_kernels.attention(**x).sum(-1))


@pytest.mark.slow
def test_rows_further_apart_than_32_bits_count(device):
    """The second block of queries (and of keys, in the backward) starts 2^31 elements behind the first."""

    def far(name: str, seed: int) -> dict:
        x = torch.empty(33 * 2**26, dtype=torch.float16, device=device).view(1, 33, 1, 2**26)[..., :16]
        return {name: x.copy_(_rand(1, 33, 1, 16, seed=seed))}

    def gradients(arguments: dict, backend: str) -> list[torch.Tensor]:
        with qvl_kernels.use_backend(backend):
            x = {name: value.detach().requires_grad_() for name, value in arguments.items()}
            out = qvl_kernels.attention(**x, causal=True)
            return [out.detach(), *torch.autograd.grad(out.float().square().sum(), x.values())]

    near = {name: x.to(device) for name, x in _qkv(t=33, s=33, h=1).items()}
    expected = gradients(near, "triton")
    for name in "qkv":
        found = gradients({**near, **far(name, "qkv".index(name) + 1)}, "triton")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "bounds", [[0, 1000, 30], [0, -5, 30], [7, 20, 30], [0, 25, 10, 30], [0, 2**31 - 1, -(2**31)]], ids=str
)
def test_bounds_of_the_device_stay_inside(bounds, device, monkeypatch):
    """Lengths on the device cannot be checked by the host: the kernel reads nothing outside (NaN) and writes nothing
    outside (guards).
    """
    x = [surrounded(_varlen([30])[name].to(device)) for name in "qkv"]
    bounds = surrounded(torch.tensor(bounds, dtype=torch.int32, device=device))
    guard = GuardedEmpty()
    with monkeypatch.context() as patch, qvl_kernels.use_backend("triton"):
        patch.setattr(torch, "empty", guard)
        out, lse = attention_op(*x, bounds, None, None, True, 0.25)
        attention_backward_op(out, None, *x, out, lse, bounds, None, None, True, 0.25, 0.0, None, False)
    guard.check()


def test_rows_behind_the_last_sequence_are_zero(device):
    x = [_varlen([30])[name].to(device).requires_grad_() for name in "qkv"]
    bounds = torch.tensor([0, 9, 21], dtype=torch.int32, device=device)
    with qvl_kernels.use_backend("triton"):
        out, lse = attention_op(*x, bounds, None, None, False, 0.25)
        short = attention_op(*(y[:21] for y in x), bounds, None, None, False, 0.25)[0]
        grads = torch.autograd.grad(out.float().square().sum(), x)
    assert torch.equal(out[:21], short) and not out[21:].any() and bool((lse[:, 21:] == -INF).all())
    assert all(bool(g[:21].any()) and not g[21:].any() for g in grads)


def test_lengths_of_the_device_are_taken_into_the_keys(device):
    x = [y.to(device) for y in _qkv(b=3, s=33).values()]
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        wild = attention_op(*x, None, torch.tensor([10**12, -7, 5], device=device), None, False, 0.25)[0]
        tame = attention_op(*x, None, torch.tensor([33, 0, 5], device=device), None, False, 0.25)[0]
    assert torch.equal(wild, tame) and not wild[1].any()


@pytest.mark.parametrize("count", _slow(1100))
def test_many_sequences(count, device):
    """More sequences than a program searches in one block."""
    lengths = [3 if i % 70 == 0 else 0 for i in range(count)]
    arguments = _varlen(lengths, h=1, dtype=torch.float32)
    with qvl_kernels.use_backend("triton"), torch.no_grad():
        out = qvl_kernels.attention(**{name: x.to(device) for name, x in arguments.items()}).cpu()
    with qvl_kernels.use_backend("reference"):
        assert relative_error(out, qvl_kernels.attention(**arguments)) < 1e-5


def _keep_mask(
    h: int, hkv: int, t: int, s: int, p: float, seed: torch.Tensor, device, lengths: list[int] | None = None, b: int = 1
) -> torch.Tensor:
    """Dropout keep mask of the kernel, [B, H, T, S]: with scores of 0 all weights are 1 / S, and values are unit
    vectors.
    """
    q, k = torch.zeros(b, t, h, s), torch.zeros(b, s, hkv, s)
    v = torch.eye(s).repeat(b, 1, 1)[:, :, None].expand(b, s, hkv, s).contiguous()
    bounds = None
    if lengths is not None:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        v = torch.cat([torch.eye(s)[:n] for n in lengths])[:, None].expand(t, hkv, s).contiguous()
        q, k = q[0], torch.zeros(t, hkv, s)
    with qvl_kernels.use_backend("triton"):
        out = attention_op(q.to(device), k.to(device), v.to(device), bounds, None, None, False, 1.0, p, seed)[0].cpu()
    return (out if lengths is None else out[None]).transpose(1, 2) != 0


def _dropped(q, k, v, keep, p: float, *, causal: bool = False) -> torch.Tensor:
    """Attention with a given dropout keep mask [B, H, T, S]."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = (q @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[2:], dtype=torch.bool).tril(scores.shape[3] - scores.shape[2]), -INF
        )
    weights = torch.where(keep, torch.softmax(scores, -1) / (1 - p), 0.0).to(v.dtype)
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, *_slow(False)])
def test_dropout_is_replayed_by_the_backward(causal, dtype, device):
    p, seed, shape = 0.4, torch.tensor([2**61 + 12345], device=device), {"h": 4, "hkv": 2, "t": 20, "s": 36}
    keep = _keep_mask(**shape, p=p, seed=seed, device=device, b=2)
    arguments = _qkv(b=2, **shape, dtype=dtype)
    cotangent = _rand(2, 20, 4, 16, dtype=torch.float32, seed=5)

    def run(function, tensors) -> list[torch.Tensor]:
        tensors = [x.detach().requires_grad_() for x in tensors]
        out = function(*tensors)
        return [out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad((out * cotangent.to(out)).sum(), tensors))]

    golden = run(lambda *x: _dropped(*x, keep, p, causal=causal), [x.double() for x in arguments.values()])
    plain = run(lambda *x: _dropped(*x, keep, p, causal=causal), arguments.values())
    with qvl_kernels.use_backend("triton"):
        ours = run(
            lambda *x: attention_op(*x, None, None, None, causal, 0.25, p, seed)[0],
            [x.to(device) for x in arguments.values()],
        )
    for a, b, c in zip(ours, plain, golden, strict=True):
        assert_close_to_fp64(a, b, c, factor=3.0)


def test_dropout_of_varlen_sequences(device):
    lengths, p, seed = [7, 30, 0, 11], 0.3, torch.tensor([99], device=device)
    keep = _keep_mask(2, 1, 48, 30, p, seed, device, lengths)
    arguments, bounds = _varlen(lengths, dtype=torch.float32), [0, 7, 37, 37, 48]
    inputs = [arguments[name].double().requires_grad_() for name in "qkv"]
    parts = [
        _dropped(*(x[None, a:b] for x in inputs), keep[:, :, a:b, : b - a], p)[0] for a, b in zip(bounds, bounds[1:])
    ]
    golden = torch.cat(parts)
    expected = [golden, *torch.autograd.grad(golden.square().sum(), inputs)]
    inputs = [arguments[name].to(device).requires_grad_() for name in "qkv"]
    with qvl_kernels.use_backend("triton"):
        out = attention_op(*inputs, arguments["cu_seqlens"].to(device), None, None, False, 0.25, p, seed)[0]
        ours = [out, *torch.autograd.grad(out.square().sum(), inputs)]
    assert all(relative_error(a.cpu(), b) < 1e-5 for a, b in zip(ours, expected))


def test_dropout_statistics(device):
    """Keep rate within five standard deviations overall, per row and per key; heads, sequences and seeds differ."""
    p, shape = 0.3, {"h": 2, "hkv": 1, "t": 64, "s": 64, "p": 0.3, "device": device, "b": 2}
    first = _keep_mask(seed=torch.tensor([7], device=device), **shape).float()
    other = _keep_mask(seed=torch.tensor([8], device=device), **shape).float()
    for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3)):
        count = math.prod(first.shape[axis] for axis in axes)
        assert (first.mean(axes) - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) / count)
    masks = [*first.flatten(0, 1), *other.flatten(0, 1)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(((a - 1 + p) * (b - 1 + p)).mean().item()) < 5 * p * (1 - p) / 64
        for moved in (a.roll(1, 0), a.roll(1, 1), a.T):
            assert abs(((a - 1 + p) * (moved - 1 + p)).mean().item()) < 5 * p * (1 - p) / 64


@pytest.mark.parametrize("function", [qvl_kernels.attention, qvl_kernels.cross_attention])
def test_dropout_follows_the_seed_of_pytorch(function, device):
    arguments = {name: x.to(device) for name, x in _qkv(s=40).items()}

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad(), qvl_kernels.use_backend("triton"):
            return function(**arguments, dropout_p=0.5)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_backward_is_the_same_every_time(device):
    arguments = {name: x.to(device).requires_grad_() for name, x in _qkv(t=20, s=40, h=2).items()}

    def run() -> tuple[torch.Tensor, ...]:
        with qvl_kernels.use_backend("triton"):
            return torch.autograd.grad(
                qvl_kernels.attention(**arguments, causal=True).float().square().sum(), list(arguments.values())
            )

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_large_heads_take_the_reference_or_raise(device):
    arguments = {name: x.to(device) for name, x in _qkv(d=264).items()}
    with qvl_kernels.use_backend("triton"), pytest.raises(RuntimeError, match="head_dim 264"):
        qvl_kernels.attention(**arguments)


@pytest.mark.parametrize("arch", SM_COUNT)
@pytest.mark.parametrize("size", [2, 4])
def test_tiles_fit(arch, size, monkeypatch):
    """Each head_dim up to 256 has tiles that fit shared memory and suit the matrix instructions."""
    monkeypatch.undo()
    for d in range(1, 257):
        for rows in (1, 17, 5000):
            for name, streamed in (
                ("attention", "BLOCK_N"),
                ("attention_backward_queries", "BLOCK_N"),
                ("attention_backward_keys", "BLOCK_M"),
            ):
                tile = getattr(tiles, name)(rows, d, size, arch)
                assert tile["BLOCK_D"] >= max(16, d) and min(tile["BLOCK_M"], tile["BLOCK_N"]) >= 16
                assert 2 * tile[streamed] * tile["BLOCK_D"] * size * tile["num_stages"] <= SHARED_MEMORY[arch]
