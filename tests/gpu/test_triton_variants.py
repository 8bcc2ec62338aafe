"""Kernel features that are off by default: the same results as without them, within the reference's bounds."""

import contextlib

import pytest
import torch
from torch.utils._pytree import tree_map

import qvl_kernels
from qvl_kernels import config
from qvl_kernels.gpu import device as gpu_device
from qvl_kernels.gpu import features
from qvl_kernels.gpu.device import ARCHITECTURES, SM_COUNT, architecture
from qvl_kernels.ops.attention import triton_attention
from qvl_kernels.ops.decode_attention import triton_decode
from qvl_kernels.ops.gemv import cases
from qvl_kernels.ops.quantized_linear import triton_int8
from qvl_kernels.quantization import quantize
from qvl_kernels.testing import GuardedEmpty, assert_close_to_fp64, random_tensor, surrounded

NAN = float("nan")


def _rand(*shape: int, dtype=torch.float16, seed: int = 0) -> torch.Tensor:
    return random_tensor(shape, dtype, torch.Generator().manual_seed(seed))


@pytest.fixture
def arch(device):
    """An architecture with the features: assumed for the interpreter, else the device's."""
    with gpu_device.assume("sm_100") if config.interpreted() else contextlib.nullcontext():
        yield architecture(device)


def _offered(kernel: str, names: tuple[str, ...], arch: str) -> None:
    missing = [name for name in names if arch not in features.SUPPORTED[kernel][name]]
    if missing:
        pytest.skip(f"{arch} has no {', '.join(missing)}")


def _attention_inputs(t=37, s=70, h=4, hkv=2, d=64, dtype=torch.float16, **others) -> dict:
    return {
        "q": _rand(2, t, h, d, dtype=dtype, seed=1),
        "k": _rand(2, s, hkv, d, dtype=dtype, seed=2),
        "v": _rand(2, s, hkv, d, dtype=dtype, seed=3),
        **others,
    }


def _varlen(lengths: list[int], **others) -> dict:
    n = sum(lengths)
    return {
        **{name: _rand(n, 2, 64, seed=seed) for seed, name in enumerate("qkv")},
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        **others,
    }


def _hide(moved: dict) -> None:
    for x in (moved["k"], moved["v"]):
        x[0, 41:], x[1] = NAN, NAN


@pytest.fixture
def check_attention(device, launches_of, monkeypatch):
    """Checks attention by TMA descriptors against the fp64 reference; returns its launches. poison: changes the
    arguments on the device.
    """

    def check(arguments: dict, poison=lambda moved: None) -> list[dict]:
        with qvl_kernels.use_backend("reference"):
            golden = qvl_kernels.attention(
                **{
                    name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
                    for name, x in arguments.items()
                }
            )
            plain = qvl_kernels.attention(**arguments)
        moved = {name: surrounded(x.to(device)) if torch.is_tensor(x) else x for name, x in arguments.items()}
        poison(moved)
        guard, launches = GuardedEmpty(), launches_of(triton_attention)
        with (
            monkeypatch.context() as patch,
            qvl_kernels.use_backend("triton"),
            features.override("attention", "DESCRIPTORS"),
        ):
            patch.setattr(torch, "empty", guard)
            out = qvl_kernels.attention(**moved)
        guard.check()
        assert_close_to_fp64(out.cpu(), plain, golden, factor=2.0)
        return launches

    return check


@pytest.mark.parametrize("d", [64, 72, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_descriptors(d, causal, dtype, arch, check_attention):
    _offered("attention", ("DESCRIPTORS",), arch)
    (launch,) = check_attention(_attention_inputs(d=d, dtype=dtype, causal=causal))
    assert launch["DESCRIPTORS"]


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_attention_by_descriptors(causal, arch, device, check_attention):
    """Varlen: blocks reach into the next sequence, whose values must not matter."""
    _offered("attention", ("DESCRIPTORS",), arch)

    def poison(moved):  # the last sequence has no queries or keys of the others
        moved["k"][-30:], moved["v"][-30:] = NAN, NAN

    (launch,) = check_attention(_varlen([0, 70, 1, 33], causal=causal))
    assert launch["DESCRIPTORS"]
    with qvl_kernels.use_backend("triton"), features.override("attention", "DESCRIPTORS"):
        moved = {
            name: x.to(device) if torch.is_tensor(x) else x for name, x in _varlen([70, 30], causal=causal).items()
        }
        clean = qvl_kernels.attention(**moved)[:70]
        poison(moved)
        assert torch.equal(qvl_kernels.attention(**moved)[:70], clean)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_hidden_keys_by_descriptors(kind, arch, check_attention):
    """Lengths of 41 and 0; masked keys are NaN."""
    _offered("attention", ("DESCRIPTORS",), arch)
    visible = torch.arange(70)[None] < torch.tensor([41, 0])[:, None]
    mask = visible[:, None, None]
    if kind == "additive":
        mask = torch.where(mask, _rand(2, 1, 1, 70), torch.tensor(-torch.inf, dtype=torch.float16))
    (launch,) = check_attention(_attention_inputs(mask=mask), poison=_hide)
    assert launch["DESCRIPTORS"]


def test_lengths_by_descriptors(arch, device, launches_of):
    _offered("attention", ("DESCRIPTORS",), arch)
    moved = {name: x.to(device) for name, x in _attention_inputs(hkv=4).items()}
    moved["kv_lens"] = torch.tensor([41, 0], dtype=torch.int32, device=device)
    with qvl_kernels.use_backend("triton"):
        plain = qvl_kernels.cross_attention(**moved)
        _hide(moved)
        launches = launches_of(triton_attention)
        with features.override("attention", "DESCRIPTORS"):
            described = qvl_kernels.cross_attention(**moved)
    assert launches[0]["DESCRIPTORS"] and not described[1].any()
    torch.testing.assert_close(described, plain, rtol=1e-3, atol=1e-3)


def test_what_descriptors_cannot_copy_goes_by_pointers(arch, device, check_attention, launches_of):
    """Rows that are no multiple of 16 bytes apart, expanded heads, dropout."""
    _offered("attention", ("DESCRIPTORS",), arch)
    (launch,) = check_attention(_attention_inputs(d=20))
    assert not launch["DESCRIPTORS"]
    arguments = _attention_inputs(hkv=1)
    with qvl_kernels.use_backend("triton"), features.override("attention", "DESCRIPTORS"):
        launches = launches_of(triton_attention)
        moved = {name: x.to(device) for name, x in arguments.items()}  # before they are expanded: a copy is not
        moved["k"], moved["v"] = (moved[name].expand(2, 70, 4, 64) for name in "kv")
        qvl_kernels.attention(**moved)
        qvl_kernels.attention(**{name: x.to(device) for name, x in _attention_inputs().items()}, dropout_p=0.1)
    assert [launch["DESCRIPTORS"] for launch in launches] == [False, False]


INT8 = [
    ("DESCRIPTORS",),
    ("PERSISTENT",),
    ("DESCRIPTORS", "PERSISTENT"),
    ("DESCRIPTORS", "PERSISTENT", "WARP_SPECIALIZE"),
]


@pytest.mark.parametrize("names", INT8, ids="+".join)
@pytest.mark.parametrize("k", [256, 144, 75])
def test_int8_products(names, k, arch, device, launches_of, monkeypatch):
    """Bit-identical to the kernel without features: sums are of integers. 75 columns are not a multiple of 16 bytes."""
    _offered("int8_matmul", names, arch)
    m, n = 150, 141
    x, weight, bias = (
        _rand(m, k).to(device),
        quantize(_rand(n, k, dtype=torch.float32, seed=1), 8),
        _rand(n, seed=2).to(device),
    )
    weight = weight._replace(values=weight.values.to(device), scales=weight.scales.to(device))
    monkeypatch.setitem(SM_COUNT, arch, 2)  # several tiles a program
    with qvl_kernels.use_backend("triton"):
        plain = qvl_kernels.quantized_linear(x, weight, bias)
        launches = launches_of(triton_int8)
        with features.override("int8_matmul", *names):
            out = qvl_kernels.quantized_linear(x, weight, bias)
    product = launches[-1]
    assert product["DESCRIPTORS"] == ("DESCRIPTORS" in names and k % 16 == 0)
    assert product["PERSISTENT"] == ("PERSISTENT" in names) and (product["grid"] == (2,)) == ("PERSISTENT" in names)
    assert torch.equal(out, plain)


@pytest.mark.skipif(config.interpreted(), reason="the interpreter has no instructions of dependent launch")
def test_dependent_launch_of_products(arch, device):
    _offered("decoding", ("PDL",), arch)
    for case in cases.CASES:
        arguments = case.make(torch.bfloat16, torch.Generator().manual_seed(0))
        moved = tree_map(lambda x: x.to(device) if torch.is_tensor(x) else x, arguments)
        op = cases.op_of(arguments)
        plain = op(**moved)
        with features.override("decoding", "PDL"):
            for _ in range(3):  # each after another such kernel
                assert torch.equal(op(**moved), plain), case.name


@pytest.mark.skipif(config.interpreted(), reason="the interpreter has no instructions of dependent launch")
def test_dependent_launch_of_decode_attention(arch, device, launches_of):
    _offered("decoding", ("PDL",), arch)
    q, k, v = (x.to(device) for x in (_rand(2, 1, 4, 64), _rand(2, 2, 900, 64, seed=1), _rand(2, 2, 900, 64, seed=2)))
    lengths = torch.tensor([900, 31], dtype=torch.int32, device=device)
    plain = qvl_kernels.decode_attention(q, k, v, lengths=lengths)
    launches = launches_of(triton_decode)
    with features.override("decoding", "PDL"):
        assert torch.equal(qvl_kernels.decode_attention(q, k, v, lengths=lengths), plain)
    assert len(launches) == 2 and all(launch["PDL"] for launch in launches)


def test_table():
    """DEFAULT is a subset of SUPPORTED, and unknown names are refused. Decode features are off elsewhere."""
    for kernel, offered in features.SUPPORTED.items():
        for arch in ARCHITECTURES:
            on = features.DEFAULT.get((kernel, arch), ())
            assert all(arch in offered[name] for name in on)
            with features.decoding():
                assert features.used(kernel, arch) == {name: name in on for name in offered}
            assert not any(features.used("decoding", arch).values())
    assert (
        features.used("attention", "sm_90", 2048)["DESCRIPTORS"]
        and not features.used("attention", "sm_90", 2047)["DESCRIPTORS"]
    )
    with pytest.raises(ValueError, match="has no features"), features.override("attention", "PERSISTENT"):
        pass
