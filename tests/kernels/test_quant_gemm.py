"""Quantised GEMM on the CPU against the matmul of quantised weights and activations, alone and within layers."""

import pytest
import torch
from bounds import norm_error
from quantized_numbers import as_multiplied
from weight_formats import FORMATS

import qvl_kernels
from qvl_kernels import dispatch, quantization
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.ops.decoder_layer import DecoderWeights
from qvl_kernels.ops.decoder_layer.quantized import QuantizedDecoderLayer
from qvl_kernels.ops.linear.weights import extension_weight
from qvl_kernels.testing import random_tensor, relative_error, surrounded

# M of one and of several panels, whole and partial tasks, blocks of k (2,048 or fewer) and groups, K not a multiple of
# 4
SIZES = [(17, 1, 1), (33, 50, 129), (64, 128, 256), (18, 7, 35), (100, 131, 2304), (70, 300, 2049), (200, 129, 96)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _golden(x: torch.Tensor, weight: quantization.QuantizedWeight) -> torch.Tensor:
    x, dense = as_multiplied(x, weight)
    return x @ dense.T


def _weight(
    n: int, k: int, bits: int, group: int, generator: torch.Generator, **options
) -> quantization.QuantizedWeight:
    dense = random_tensor((n, k), torch.float32, generator, scale=k**-0.5)
    return quantization.quantize(dense, bits, group, **options)


@pytest.mark.parametrize(("bits", "group", "options"), FORMATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_product_of_rounded_numbers(bits, group, options, size):
    (m, n, k), generator = size, _generator()
    weight = _weight(n, k, bits, group, generator, **options)
    x = random_tensor((m, k + 3), torch.float32, generator)[:, 3:]
    x[:, k // 2] *= 100.0
    x[m // 2] = 0.0
    bias = random_tensor((n,), torch.float32, generator)
    weight = weight.apply(surrounded)
    for dtype in DTYPES:
        typed = surrounded(x.to(dtype))
        out = qvl_kernels.quantized_linear(typed, weight, bias.to(dtype))
        assert relative_error(out, _golden(typed, weight) + bias.to(dtype).double()) <= norm_error(
            dtype, -(-k // group)
        )


@pytest.mark.parametrize(("bits", "group", "options"), FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_rows_that_are_not_finite_are_nan_and_alone(bits, group, options, bad):
    generator = _generator()
    weight = _weight(45, 300, bits, group, generator, **options)
    x = random_tensor((80, 300), torch.float32, generator)
    clean = qvl_kernels.quantized_linear(x, weight)
    x[66, 290] = bad
    out = qvl_kernels.quantized_linear(x, weight)
    assert out[66].isnan().all()
    assert torch.equal(torch.cat((out[:66], out[67:])), torch.cat((clean[:66], clean[67:])))


def test_int8_minus_128_and_the_longest_sums():
    k = 70_000  # one int32 accumulator over all of K would overflow
    weight = quantization.QuantizedWeight(torch.full((5, k), -128, dtype=torch.int8), torch.ones(5, 1), k)
    out = qvl_kernels.quantized_linear(torch.full((20, k), 127.0), weight)
    assert relative_error(out, torch.full((20, 5), -128.0 * 127 * k)) <= norm_error(torch.float32, k // 2048)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_do_not_depend_on_how_many_there_are(bits):
    """M larger than one chunk of panels."""
    generator = _generator()
    weight = _weight(6, 64, bits, 32, generator)
    x = random_tensor((2100, 64), torch.float32, generator)
    out = qvl_kernels.quantized_linear(x, weight)
    assert relative_error(out, _golden(x, weight)) <= norm_error(torch.float32, 2)
    assert torch.equal(out[2040:2080], qvl_kernels.quantized_linear(x[2040:2080], weight))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_rows_do_not_depend_on_how_many_threads_there_are(bits):
    """With many threads, blocks of activations are smaller."""
    generator, before = _generator(), torch.get_num_threads()
    x = random_tensor((262, 160), torch.bfloat16, generator)
    dense = random_tensor((300, 160), torch.bfloat16, generator)
    outs = []
    try:
        for threads in (1, 2, 32):
            torch.set_num_threads(threads)
            if bits is None:
                outs.append(qvl_kernels.linear(x, dense))
            else:
                outs.append(qvl_kernels.quantized_linear(x, quantization.quantize(dense, bits, 32)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def _decoder(dtype: torch.dtype, generator: torch.Generator) -> DecoderWeights:
    hidden, heads, kv_heads, head_dim, mlp = 160, 4, 2, 32, 300
    shapes = {
        "q": (heads * head_dim, hidden),
        "k": (kv_heads * head_dim, hidden),
        "v": (kv_heads * head_dim, hidden),
        "o": (hidden, heads * head_dim),
        "gate": (mlp, hidden),
        "up": (mlp, hidden),
        "down": (hidden, mlp),
    }
    matrices = {name: random_tensor(shape, dtype, generator, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
    norms = {name: torch.ones(hidden, dtype=dtype) for name in ("input_norm", "post_norm")}
    return DecoderWeights(
        **matrices, **norms, q_norm=torch.ones(head_dim, dtype=dtype), k_norm=torch.ones(head_dim, dtype=dtype)
    )


def _quantised(matrix: torch.Tensor, name: str) -> quantization.QuantizedWeight:
    return quantization.quantize(matrix, 8 if name == "int8" else 4, 32, zero_points=name == "zeros")


def _run(weights: DecoderWeights, x: torch.Tensor) -> torch.Tensor:
    time, dtype = x.shape[1], x.dtype
    # In fp64: the first cosines in fp32 of a process are sometimes off by 2e-4.
    angles = (torch.arange(time)[None, :, None] * 10.0 ** -torch.linspace(0, 2, 16).repeat(2)).double()
    caches = [torch.zeros(1, 2, time, 32, dtype=dtype) for _ in range(2)]
    layer = QuantizedDecoderLayer(weights, num_heads=4, kv_heads=2, eps=1e-6, scale=32**-0.5)
    return layer(x, *(f(angles).to(dtype) for f in (torch.cos, torch.sin)), *caches, past=0)


@pytest.mark.parametrize(
    "formats",
    [("int8", "int8"), ("int4", "int4"), ("int8", "int4"), ("int4", "int8"), ("zeros", "zeros")],
    ids="-".join,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoder_layer_is_its_fake_quantised_composition(formats, dtype):
    """The activations between gate/up and down are quantised in panels and never written out as rows."""
    generator = _generator()
    stored = _decoder(dtype, generator)
    names = ("q", "k", "v", "o", "gate", "up", "down")
    matrices = {name: _quantised(getattr(stored, name), formats[name == "down"]) for name in names}
    if formats[0] == "zeros":  # weights with and without zero-points share a call, of bf16 and fp16 scales too
        matrices["k"], matrices["up"] = (_quantised(getattr(stored, name), "int4") for name in ("k", "up"))
        matrices["v"] = quantization.quantize(stored.v, 4, 32, zero_points=True, scale_dtype=torch.float16)
    x = random_tensor((1, 70, 160), dtype, generator)
    x[..., 7] *= 30.0
    with torch.inference_mode():
        out = _run(stored._replace(**matrices), x).double()
        expected = _fake_quantised(stored, matrices, x)
        plain = _run(stored, x).double()
    assert torch.cosine_similarity(out.flatten(), expected.flatten(), dim=0) > 0.9999
    if dtype == torch.float32:  # bf16 between the matmuls moves some activations to the next integer
        update, expected_update = out - x.double(), expected - x.double()
        assert torch.cosine_similarity(update.flatten(), expected_update.flatten(), dim=0) > 0.999999
        assert relative_error(plain, expected) > 10 * relative_error(out, expected)


def _fake_quantised(stored: DecoderWeights, matrices: dict, x: torch.Tensor) -> torch.Tensor:
    """The layer in fp64, each matmul with quantised activations and weights."""

    def product(a, name):
        return _golden(a.float(), matrices[name])

    def norm(a):
        return a * (a.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    time, x = x.shape[1], x.double()
    heads = [product(norm(x), name).view(1, time, -1, 32) for name in ("q", "k", "v")]
    angles = (torch.arange(time)[None, :, None] * 10.0 ** -torch.linspace(0, 2, 16).repeat(2)).double()
    ones = torch.ones(32, dtype=torch.float64)
    with qvl_kernels.use_backend("reference"):
        q, k = qvl_kernels.qk_norm_rope(*heads[:2], ones, ones, angles.cos(), angles.sin(), eps=1e-6)
        attended = qvl_kernels.attention(q, k, heads[2], causal=True, scale=32**-0.5)
    x = x + product(attended.reshape(1, time, -1), "o")
    hidden = torch.nn.functional.silu(product(norm(x), "gate")) * product(norm(x), "up")
    return x + product(hidden, "down")


@pytest.mark.parametrize(("bits", "options"), [(8, {}), (4, {}), (4, {"zero_points": True})])
def test_vision_block_is_its_fake_quantised_composition(bits, options):
    """GELU outputs are quantised in panels; matmuls have biases."""
    generator, tokens, hidden, heads, mlp = _generator(), 90, 96, 3, 200
    shapes = [(3 * hidden, hidden), (hidden, hidden), (mlp, hidden), (hidden, mlp)]
    matrices = [_weight(*shape, bits, 32, generator, **options) for shape in shapes]
    biases = [random_tensor(shape[:1], torch.float32, generator) for shape in shapes]
    norms = [torch.ones(hidden), torch.zeros(hidden)] * 2
    x = random_tensor((tokens, hidden), torch.float32, generator)
    angles = torch.arange(tokens)[:, None] * 10.0 ** -torch.linspace(0, 2, 16).repeat(2)
    cos, sin, ends = angles.cos(), angles.sin(), torch.tensor([0, 40, tokens], dtype=torch.int32)
    out = torch.full_like(x, torch.nan)
    dispatch.extension().vision_block(
        x=x.data_ptr(),
        out=out.data_ptr(),
        norms=[norm.data_ptr() for norm in norms],
        weights=[extension_weight(weight, bias) for weight, bias in zip(matrices, biases)],
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        cos_stride=32,
        sin_stride=32,
        cu_seqlens=ends.data_ptr(),
        sequences=2,
        tokens=tokens,
        hidden=hidden,
        heads=heads,
        head_dim=32,
        mlp=mlp,
        eps=1e-6,
        scale=32**-0.5,
        dtype=DTYPE_CODES[torch.float32],
    )

    def product(a, index):
        return _golden(a.float(), matrices[index]) + biases[index]

    wide = x.double()
    with qvl_kernels.use_backend("reference"):
        q, k, v = (
            product(torch.nn.functional.layer_norm(wide, (hidden,), eps=1e-6), 0).view(tokens, 3, heads, 32).unbind(1)
        )
        q, k = qvl_kernels.vision_rope(q, k, cos.double(), sin.double())
        parts = [slice(0, 40), slice(40, tokens)]
        attended = [
            qvl_kernels.attention(q[None, part], k[None, part], v[None, part], scale=32**-0.5)[0] for part in parts
        ]
    middle = wide + product(torch.cat(attended).reshape(tokens, hidden), 1)
    gelu = torch.nn.functional.gelu(
        product(torch.nn.functional.layer_norm(middle, (hidden,), eps=1e-6), 2), approximate="tanh"
    )
    expected = middle + product(gelu, 3)
    assert torch.cosine_similarity((out - x).double().flatten(), (expected - wide).flatten(), dim=0) > 0.99999


def test_layers_beside_one_that_mixes_gate_and_up_stay_one_call(monkeypatch):
    from qvl_kernels.ops.decoder_layer import prepared

    generator, dtype, time = _generator(), torch.float32, 5
    stored = _decoder(dtype, generator)
    names = ("q", "k", "v", "o", "gate", "up", "down")
    uniform = stored._replace(**{name: _quantised(getattr(stored, name), "int4") for name in names})
    mixed = uniform._replace(gate=_quantised(stored.gate, "int8"))
    layers = [
        QuantizedDecoderLayer(weights, num_heads=4, kv_heads=2, eps=1e-6, scale=32**-0.5)
        for weights in (uniform, uniform, mixed, uniform, uniform, uniform)
    ]
    x, angles = random_tensor((1, time, 160), dtype, generator), torch.randn(1, time, 32, generator=generator)
    cos, sin = angles.cos(), angles.sin()

    def caches():
        return [prepared.PreparedCache(*torch.zeros(2, 1, 2, time, 32, dtype=dtype)) for _ in layers]

    counts, run = [], prepared.run_extension_layers
    with torch.inference_mode():
        expected = x
        for layer, cache in zip(layers, caches()):
            expected = layer(expected, cos, sin, cache.k_cache, cache.v_cache, past=0)
        monkeypatch.setattr(
            prepared, "run_extension_layers", lambda handles, *rest: counts.append(len(handles)) or run(handles, *rest)
        )
        outs = prepared.PreparedDecoderLayer.run(layers, x, cos, sin, caches(), past=0)
        last = prepared.Run(layers, caches())(x, cos, sin, past=0, mask=None)
    assert counts == [2, 3, 2, 3] and len(outs) == 6
    assert torch.equal(outs[-1], expected) and torch.equal(last, expected)
