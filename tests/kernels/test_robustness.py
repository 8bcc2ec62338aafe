"""Extreme sizes, values and thread counts, on every instruction set of this machine and by PyTorch's linear."""

import functools
from collections.abc import Callable

import pytest
import torch
from bounds import norm_error
from kernel_selection import ISAS, select, selections
from op_cases import OPS, double, outputs, reference
from quantized_numbers import as_multiplied

import qvl_kernels
from qvl_kernels import quantization
from qvl_kernels.testing import instruction_set, random_tensor, relative_error

NAN, INF = float("nan"), float("inf")
FORMATS = [None, (8, 128), (4, 32), (4, 64), (4, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _matmuls(
    x: torch.Tensor, weight: torch.Tensor | quantization.QuantizedWeight, bias: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """x weight^T + bias by each instruction set's kernels, and of the numbers that they multiply in fp64."""
    dense = isinstance(weight, torch.Tensor)
    function = qvl_kernels.linear if dense else qvl_kernels.quantized_linear
    pairs = {}
    for isa in ISAS:
        with instruction_set(isa):
            out = function(x, weight, bias)
        x64, weight64 = (x.double(), weight.double()) if dense else as_multiplied(x, weight, isa)
        pairs[isa] = out, x64 @ weight64.T + bias.double()
    return pairs


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_products_of_any_size(form):
    generator = _generator()
    for n in (1, 2, 7, 97):
        for k in (1, 3, 33, 129) if form else (0, 1, 3, 33, 129):
            weight = random_tensor((n, k), torch.float32, generator)
            quantised = quantization.quantize(weight, *form) if form else None
            bias = random_tensor((n,), torch.float32, generator).abs() + 4 * k**0.5  # sums do not vanish
            for m in (0, 1, 2, 16, 17, 67):
                x = random_tensor((m, k), torch.float32, generator)
                for dtype in DTYPES:
                    pairs = _matmuls(x.to(dtype), quantised or weight.to(dtype), bias.to(dtype))
                    for isa, (out, exact) in pairs.items():
                        assert out.shape == (m, n) and relative_error(out, exact) <= norm_error(dtype, k), (
                            isa,
                            m,
                            n,
                            k,
                            dtype,
                        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 16, 40])
def test_weights_with_a_zero_row_an_outlier_and_denormals(rows, dtype):
    generator, k = _generator(), 130
    x, weight = random_tensor((rows, k), dtype, generator), random_tensor((41, k), dtype, generator)
    denormal = torch.finfo(dtype).tiny / 4
    weight[0], weight[2] = 0.0, denormal
    weight[1, 7] = 1e4 if dtype == torch.float16 else 1e30
    for isa, (out, exact) in _matmuls(x, weight, torch.zeros(41, dtype=dtype)).items():
        assert not out[:, 0].any(), isa
        for column in (1, *range(3, 41)):
            assert relative_error(out[:, column], exact[:, column]) <= norm_error(dtype, k), (isa, column)
        # Some instructions flush denormals to zero.
        assert bool((out[:, 2].double() - exact[:, 2]).abs().le(k * 4 * denormal).all()), isa


# Cases without masks and without causality over several queries; test_attention covers masked keys.
ACTIVATIONS = {
    "rms_norm": (("x",), ("prime", "strided")),
    "add_rms_norm": (("x", "residual"), ("prime",)),
    "layer_norm": (("x",), ("prime", "strided")),
    "add_layer_norm": (("x", "residual"), ("prime",)),
    "swiglu": (("gate", "up"), ("odd", "strided")),
    "gelu_tanh": (("x",), ("odd", "odd_bias")),
    "linear": (("x",), ("one", "odd_k_rows_2", "rows_5", "odd_k_rows_17", "many_panels", "whole_tiles")),
    "patch_embed": (("pixels",), ("odd", "no_bias", "whole_tiles")),
    "linear_cross_entropy": (("hidden",), ("none", "sum_smoothed", "whole_tiles")),
    "qk_norm_rope": (("q", "k"), ("odd_half",)),
    "vision_rope": (("q", "k"), ("odd",)),
    "attention": (("q", "k", "v"), ("one_query", "odd_head_dim", "varlen")),
    "cross_attention": (("q", "k", "v"), ("lengths", "one_query")),
    "decode_attention": (("q", "k_cache", "v_cache"), ("lengths",)),
    "decoder_layer": (("x",), ("odd_decode",)),
    "vision_block": (("x",), ("odd", "whole_tiles")),
}


def test_every_op_but_the_quantised_is_here():
    """quantized_linear makes the whole row NaN: see test_quantized_linear."""
    assert set(ACTIVATIONS) == set(OPS) - {"quantized_linear"}


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, (names, _) in ACTIVATIONS.items() for name in names])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_activations_propagate_as_in_the_reference(op, name, dtype, bad):
    function, cases = OPS[op]
    for case in cases:
        if case.name not in ACTIVATIONS[op][1]:
            continue
        arguments = case.make(dtype, _generator())
        spoiled = arguments[name] = arguments[name].clone()
        spoiled[tuple(size // 2 for size in spoiled.shape)] = bad
        exact = reference(function, double(arguments))
        for kernels in selections(op, dtype, overreading=True):
            with torch.no_grad(), qvl_kernels.use_backend("cpp"), select(kernels):
                outs = outputs(function(**arguments))
            for out, golden in zip(outs, exact):
                for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                    assert torch.equal(kind(out), kind(golden)), f"{case.name} on {kernels}: {kind.__name__}"


@functools.cache
def _parallel_calls() -> dict[str, Callable]:
    """Calls large enough to be split over threads, by name."""
    generator = _generator()

    def tensor(*shape, dtype=torch.float32):
        return random_tensor(shape, dtype, generator)

    weight, rows = tensor(700, 515), {"few": tensor(3, 515), "many": tensor(200, 515)}
    calls = {}
    for form in (None, (8, 128), (4, 64)):
        quantised = weight if form is None else quantization.quantize(weight, *form)
        function = qvl_kernels.linear if form is None else qvl_kernels.quantized_linear
        for name, x in rows.items():
            calls[f"linear_{name}_{form}"] = lambda function=function, x=x, quantised=quantised: function(x, quantised)
    wide = tensor(300, 515)
    calls["rms_norm"] = lambda: qvl_kernels.rms_norm(wide, wide[0])
    calls["swiglu"] = lambda: qvl_kernels.swiglu(wide, wide)
    q, kv = tensor(2, 150, 6, 40), tensor(2, 150, 3, 40)
    calls["attention"] = lambda: qvl_kernels.attention(q, kv, kv, causal=True)
    calls["rope"] = lambda: qvl_kernels.qk_norm_rope(q, q, q[0, 0, 0], q[0, 0, 0], q[:1, :, 0], q[:1, :, 1])[0]
    return calls


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", _parallel_calls())
def test_any_number_of_threads_gives_the_same(name, isa):
    call, before, results = _parallel_calls()[name], torch.get_num_threads(), []
    try:
        with instruction_set(isa):
            for threads in (1, 2, 3, 9):  # 9: more than cores, and than some calls have tasks
                torch.set_num_threads(threads)
                results.append(call())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
