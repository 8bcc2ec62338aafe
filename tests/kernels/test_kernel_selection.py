"""Ops by PyTorch's kernels, forced here: as where these measure faster, and on machines with AMX."""

import pytest
import torch
from bounds import norm_error
from kernel_selection import OVERREADING, ROUTED, select
from op_cases import OPS, double, generator, outputs, reference
from quantized_numbers import rounded_again

import qvl_kernels
from qvl_kernels import quantization, tuning
from qvl_kernels.ops.attention import pytorch as attention_pytorch
from qvl_kernels.ops.attention import selection as attention_selection
from qvl_kernels.ops.linear.selection import MIN_ROWS
from qvl_kernels.ops.quantized_linear import selection as quantized_linear_selection
from qvl_kernels.testing import assert_close_to_fp64, relative_error, surrounded

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
CASES = [
    pytest.param(op, case, id=f"{op}-{case.name}") for op in sorted(ROUTED) for case in OPS[op][1] if not case.model
]
NAN = float("nan")


@pytest.fixture
def calls(monkeypatch):
    """PyTorch's kernels that were called."""
    seen = []

    def watch(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (seen.append(name), function(*args))[1])

    watch(torch.nn.functional, "linear")
    watch(attention_pytorch, "_attend")
    return seen


# Cases that PyTorch's kernels take: whole tiles, and no mask.
TAKEN = {
    "attention": {"causal_square", "one_query", "head_dim_256", "split_keys", "varlen_whole_tiles", "whole_tiles"},
    "cross_attention": {"whole_tiles"},
    "decoder_layer": {"panels", "bool_mask", "additive_mask", "whole_tiles"},
    "linear": {"rows_5", "whole_tiles"},
    "linear_cross_entropy": {"whole_tiles"},
    "patch_embed": {"whole_tiles", "no_bias"},
    "quantized_linear": {"int4_whole_tiles", "int4_zeros_whole_tiles", "int8_whole_tiles"},
    "vision_block": {"one_patch", "panels", "whole_tiles", "wide_heads"},
}


ATTENDING = {"attention", "cross_attention", "decoder_layer", "vision_block"}


@DTYPES
@pytest.mark.parametrize("name", [tuning.QVL, tuning.PYTORCH])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_each_backend(op, case, name, dtype, calls):
    function, plain_arguments = OPS[op][0], case.make(dtype, generator())
    golden, plain = reference(function, double(plain_arguments)), reference(function, plain_arguments)
    calls.clear()
    arguments = case.make(dtype, generator())
    kernels = qvl_kernels.cpu_info()["isa"] if name == tuning.QVL else name
    with torch.no_grad(), qvl_kernels.use_backend("cpp"), select(kernels):
        out = outputs(function(**arguments))
    assert bool(calls) == (name == tuning.PYTORCH and case.name in TAKEN[op]), calls
    if case.name in ("whole_tiles", "wide_heads") and name == tuning.PYTORCH:
        assert ("_attend" in calls) == (op in ATTENDING and (op, case.name) != ("vision_block", "whole_tiles"))
    for ours, baseline, exact in zip(out, plain, golden):
        floor = norm_error(dtype, 1, roundings=4) + (0.0 if "linear" in calls else rounded_again(arguments))
        assert_close_to_fp64(ours, baseline, exact, floor=floor)


def test_linear_goes_to_the_kernel_chosen_for_its_kind_in_whole_tiles(calls, monkeypatch):
    asked = []
    monkeypatch.setattr(tuning, "chosen", lambda kind: (asked.append(kind), tuning.PYTORCH)[1])
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        for rows, tokens in ((1, "few"), (MIN_ROWS - 1, "few"), (MIN_ROWS, "many")):
            for k in (31, 32, 33, 48, 64):
                calls.clear()
                asked.clear()
                qvl_kernels.linear(torch.randn(rows, k).to(dtype), torch.randn(5, k).to(dtype))
                assert asked == ([f"linear {name}, {tokens} tokens"] if k % 32 == 0 else [])
                assert bool(calls) == bool(asked)


@pytest.mark.parametrize("bits", [8, 4])
def test_few_tokens_of_quantised_weights_stay_here(bits, calls):
    weight = quantization.quantize(torch.randn(5, 64), bits)
    for rows in (1, MIN_ROWS - 1, MIN_ROWS):
        with select(tuning.PYTORCH):
            qvl_kernels.quantized_linear(torch.randn(rows, 64), weight)
        assert bool(calls) == (rows >= MIN_ROWS)


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"bits": 4, "group": 32, "zero_points": True}], ids=str)
def test_quantised_weights_are_dequantised_in_blocks(options, monkeypatch):
    weight, x, bias = quantization.quantize(torch.randn(75, 64), **options), torch.randn(2, 20, 64), torch.randn(75)
    monkeypatch.setattr(quantized_linear_selection, "BLOCK_ROWS", 32)
    with select(tuning.PYTORCH):
        out = qvl_kernels.quantized_linear(x, weight, bias)
    golden = x.double() @ quantization.dequantize(weight).double().T + bias.double()
    assert relative_error(out, golden) <= norm_error(torch.float32, 64)


@pytest.mark.parametrize("name", [tuning.PYTORCH, OVERREADING])
@DTYPES
def test_what_lies_between_rows_is_not_read(dtype, name):
    """Memory around the tensors and between their rows is NaN, and so is one row."""
    others = torch.arange(40) != 20
    for k in (*range(1, 10), 31, 32, 33, 48, 63, 64, 65, 96):
        for gaps in ((0, 0), (3, 0), (0, 3), (1, 1), (8, 8)):
            x, weight = (
                surrounded(torch.randn(rows, k + gap, generator=generator()).to(dtype)[:, :k])
                for rows, gap in zip((40, 11), gaps)
            )
            x[20] = NAN
            with select(name):
                out = qvl_kernels.linear(x, weight)
            assert out[20].isnan().all() and out[others].isfinite().all(), (k, gaps)
            assert relative_error(out[others], x[others].double() @ weight.double().T) < 1e-2


# Attention


def _qkv(dtype, queries, keys, *, gap=8):
    """q, k, v [1, T, 4 or 2, 32] amid NaN."""
    sizes = ((queries, 4), (keys, 2), (keys, 2))
    wide = (torch.randn(1, t, h, 32 + gap, generator=generator()).to(dtype) for t, h in sizes)
    return [surrounded(x)[..., :32] for x in wide]


@DTYPES
@pytest.mark.parametrize(("queries", "keys", "causal"), [(45, 45, True), (64, 64, True), (45, 70, False)])
def test_attention_of_a_row_with_nan(dtype, queries, keys, causal, calls):
    """A query of NaN makes its own row NaN; what lies around the tensors is not read; lse is that of the op."""
    q, k, v = _qkv(dtype, queries, keys)
    q[0, 7, 1] = NAN
    with select(tuning.PYTORCH):
        out, lse = qvl_kernels.attention(q, k, v, causal=causal, return_lse=True)
    golden, golden_lse = reference(
        lambda **options: qvl_kernels.attention(q.double(), k.double(), v.double(), **options),
        {"causal": causal, "return_lse": True},
    )
    assert calls == ["_attend"] and out.is_contiguous() and lse.is_contiguous()
    assert torch.equal(out.isnan(), golden.isnan()) and torch.equal(lse.isnan(), golden_lse.isnan())
    assert relative_error(out.nan_to_num(), golden.nan_to_num()) < norm_error(dtype, 32, exponent=20)
    assert relative_error(lse.nan_to_num(), golden_lse.nan_to_num()) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"mask": torch.ones(1, 1, 1, 70, dtype=torch.bool)},
        {"key_padding_mask": torch.ones(1, 70, dtype=torch.bool)},
        {"causal": True},  # fewer queries than keys: aligned at the last key
    ],
    ids=lambda options: next(iter(options)),
)
def test_masked_attention_stays_here(options, calls):
    with select(tuning.PYTORCH):
        qvl_kernels.attention(*_qkv(torch.float32, 45, 70), **options)
    assert not calls


def test_short_sequences_stay_here(calls, monkeypatch):
    monkeypatch.setattr(tuning, "chosen", lambda kind: tuning.PYTORCH)
    n = attention_selection.MIN_TOKENS
    for lengths, taken in (([n - 1], False), ([n], True), ([n, n], True), ([n, n - 2], False)):
        q = torch.randn(sum(lengths), 1, 32)
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        calls.clear()
        qvl_kernels.attention(q, q, q, cu_seqlens=bounds)
        assert bool(calls) == taken, lengths


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_by_pytorch_attention(causal, calls):
    q, k, v = (x.clone().requires_grad_() for x in _qkv(torch.float32, 45, 45))
    with select(tuning.PYTORCH):
        qvl_kernels.attention(q, k, v, causal=causal).square().sum().backward()
    assert calls
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    with qvl_kernels.use_backend("reference"):
        qvl_kernels.attention(*wide, causal=causal).square().sum().backward()
    for ours, exact in zip((q, k, v), wide):
        assert relative_error(ours.grad, exact.grad) < 1e-5
