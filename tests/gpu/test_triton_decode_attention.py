"""decode_attention's kernels beyond the shared cases: splits over keys, lengths out of range, NaN beyond them, strides,
head sizes, int8 KV caches.
"""

import pytest
import torch

import qvl_kernels
from qvl_kernels.gpu.device import SM_COUNT
from qvl_kernels.ops.decode_attention import tiles
from qvl_kernels.ops.decode_attention.op import decode_attention_op
from qvl_kernels.testing import GuardedEmpty, assert_close_to_fp64, random_tensor, surrounded


def _rand(*shape: int, dtype=torch.float16, seed: int = 0) -> torch.Tensor:
    return random_tensor(shape, dtype, torch.Generator().manual_seed(seed))


def _arguments(b=2, t=1, h=4, hkv=2, d=16, s=50, dtype=torch.float16) -> dict:
    return {
        "q": _rand(b, t, h, d, dtype=dtype),
        "k_cache": _rand(b, hkv, s, d, dtype=dtype, seed=1),
        "v_cache": _rand(b, hkv, s, d, dtype=dtype, seed=2),
    }


def _check(arguments: dict, lengths: torch.Tensor, device, monkeypatch, **changes) -> None:
    def call(x: dict, backend: str, lengths: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), qvl_kernels.use_backend(backend):
            return qvl_kernels.decode_attention(**x, lengths=lengths)

    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    arguments = {**arguments, **changes}
    golden, baseline = (
        call({k: double(v) for k, v in arguments.items()}, "reference", lengths),
        call(arguments, "reference", lengths),
    )
    guard = GuardedEmpty()
    monkeypatch.setattr(torch, "empty", guard)
    out = call(
        {k: surrounded(v.to(device)) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()},
        "triton",
        lengths.to(device),
    )
    monkeypatch.undo()
    guard.check()
    assert_close_to_fp64(out.cpu(), baseline, golden)


def _force_splits(monkeypatch, splits: int) -> None:
    plain = tiles.decode_attention
    monkeypatch.setattr(
        tiles,
        "decode_attention",
        lambda *args: {**plain(*args), "SPLITS": splits, "BLOCK_N": 16, "COMBINE_STEP": min(2, splits)},
    )


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("t", [1, 3])
def test_every_length(splits, t, dtype, device, monkeypatch):
    """Lengths from one key on, across every border of blocks and splits; the rest of the KV cache is NaN."""
    s, lengths = 50, torch.tensor([t, 15 + t, 16, 17, 31, 33, 47, 48, 49, 50], dtype=torch.int32)
    arguments = _arguments(b=len(lengths), t=t, s=s, h=2, hkv=1, dtype=dtype)
    for name in ("k_cache", "v_cache"):
        for row, length in enumerate(lengths.tolist()):
            arguments[name][row, :, length:] = float("nan")
    with monkeypatch.context() as patch:
        _force_splits(patch, splits)
        _check(arguments, lengths, device, monkeypatch)


@pytest.mark.parametrize(("h", "hkv", "t"), [(16, 1, 1), (4, 4, 16), (10, 2, 7), (16, 2, 9)], ids=str)
def test_groups_and_queries(h, hkv, t, device, monkeypatch):
    """Query heads of a KV head and its queries share a tile, or several tiles if there are more."""
    _check(_arguments(b=1, t=t, h=h, hkv=hkv, s=40), torch.tensor([33]), device, monkeypatch)


@pytest.mark.parametrize("d", [16, 24, 80, 96, 128, 256])
def test_head_sizes(d, device, monkeypatch):
    _check(_arguments(b=1, d=d), torch.tensor([41]), device, monkeypatch)


def test_lengths_of_the_device_are_taken_into_the_cache(device):
    """Lengths on the device are clamped by the kernel: more keys than the cache has means all, none gives zeros."""
    x = _arguments(b=3, s=33)
    plain = [x[name].to(device) for name in ("q", "k_cache", "v_cache")]
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        wild = decode_attention_op(*plain, torch.tensor([10**9, -7, 33], device=device), None, None, None, 0.25)
        tame = decode_attention_op(*plain, torch.tensor([33, 33, 33], device=device), None, None, None, 0.25)
    assert torch.equal(wild[[0, 2]], tame[[0, 2]]) and not wild[1].any()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_strided_everything(index, device, monkeypatch):
    """A cache [B, S, Hkv, D] seen transposed, queries out of a fused projection, lengths out of a table."""
    s, wide = 37, _rand(2, 1, 4, 3 * 16)
    _check(
        {
            "q": wide[..., 16:32],
            "k_cache": _rand(2, s, 2, 16, seed=1).transpose(1, 2),
            "v_cache": _rand(2, s + 3, 2, 16, seed=2)[:, 3:].transpose(1, 2),
        },
        torch.tensor([[5, 0], [37, 0]], dtype=index)[:, 0],
        device,
        monkeypatch,
    )


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 50), (2, 1, 3, 50), (1, 4, 3, 1), (2, 4, 1, 50)], ids=str)
def test_masks(kind, shape, device, monkeypatch):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4
    if kind == "additive":
        mask = torch.where(mask, _rand(*shape), torch.tensor(float("-inf"), dtype=torch.float16))
    _check(_arguments(t=3), torch.tensor([50, 20]), device, monkeypatch, mask=mask)


def test_rows_that_see_nothing_are_zero(device, monkeypatch):
    mask = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    mask[1] = False
    arguments = _arguments()
    _check(arguments, torch.tensor([50, 50]), device, monkeypatch, mask=mask)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_cache_with_strided_scales(scale_dtype, device, monkeypatch):
    """Scales of a cache [B, S, Hkv], and of values so small that p * scale would underflow in fp16."""
    if scale_dtype == torch.bfloat16 and device.type == "cpu":
        scales = (_rand(2, 50, 2, seed=4).abs().clamp(min=0.1).bfloat16() * 1e-3).transpose(
            1, 2
        )  # loaded, not multiplied, as bf16
    else:
        scales = (_rand(2, 50, 2, dtype=torch.float32, seed=4).abs() * 1e-3 + 1e-4).to(scale_dtype).transpose(1, 2)
    caches = {
        name: torch.randint(-127, 128, (2, 2, 50, 16), generator=torch.Generator().manual_seed(5), dtype=torch.int8)
        for name in ("k_cache", "v_cache")
    }
    _check(
        {"q": _rand(2, 2, 4, 16), **caches}, torch.tensor([50, 23]), device, monkeypatch, k_scale=scales, v_scale=scales
    )


def test_splits_depend_on_shapes_alone_and_fill_the_chip():
    for arch in SM_COUNT:
        one = tiles.decode_attention(8, 2, 128, 2, 4096, arch)
        assert one["SPLITS"] == 64 and one["SPLITS"] * one["BLOCK_N"] <= 4096
        assert tiles.decode_attention(8 * 512, 2, 128, 2, 4096, arch)["SPLITS"] == 1
        assert tiles.decode_attention(8, 2, 128, 2, 20, arch)["SPLITS"] == 1
