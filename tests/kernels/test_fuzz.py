"""Fuzzing: every op with a C++ kernel on every instruction set, and by oneDNN, over random shapes, strides, lengths,
masks and thread counts.

All tensors lie between guard pages. A case is a dictionary of numbers and strings; see ``fuzzing`` for what to do when
one ends the process. Outputs are compared with the reference in fp64, within bounds derived from the number of
roundings.
"""

from unittest import mock

import bounds
import fuzzing
import pytest
import torch
from bounds import SINGLE
from fuzzing import Layouts, Trial
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_selection import TILE_ISAS
from op_cases import OPS, map_tensors, reference
from quantized_numbers import as_multiplied

import qvl_kernels
from qvl_kernels.ops.decode_attention.reference import dequantize_cache
from qvl_kernels.ops.decoder_layer import DecoderWeights
from qvl_kernels.ops.decoder_layer.reference import decoder_layer_reference
from qvl_kernels.ops.rms_norm.reference import rms_norm_reference
from qvl_kernels.ops.rope.reference import rotate_half
from qvl_kernels.ops.vision_block import VisionWeights
from qvl_kernels.ops.vision_block.reference import vision_block_reference
from qvl_kernels.quantization import QuantizedWeight, dequantize, quantize, rounded_activations
from qvl_kernels.testing import random_tensor

SHORT, LONG = 50, 2000  # cases of an op in `make test` and, on top, in `make test-all`


def sizes(low: int, high: int, *edges: int) -> st.SearchStrategy[int]:
    """Numbers from low to high; in a third of the cases one of the edge values."""
    return st.integers(low, high) | st.integers(low, high) | st.sampled_from(edges) if edges else st.integers(low, high)


def cases(**fields: st.SearchStrategy) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(
        {
            **fields,
            "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
            "seed": st.integers(0, 1 << 20),
            "layout": st.integers(0, 1 << 20),
            "threads": st.sampled_from([1, 2, 5]),
        }
    )


def double(arguments: dict) -> dict:
    """In float64, and contiguous: PyTorch's copy of a tensor with strides of 0 may have its last dimension strided."""
    return map_tensors(lambda x: x.double().contiguous(), arguments)


class Inputs:
    """Random tensors of one case, and their placement."""

    def __init__(self, case: dict) -> None:
        self.dtype = getattr(torch, case["dtype"])
        self.eps, self.tiny = torch.finfo(self.dtype).eps, torch.finfo(self.dtype).tiny
        self.generator = torch.Generator().manual_seed(case["seed"])
        self.laid = Layouts(case["layout"])

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        return random_tensor(shape, dtype or self.dtype, self.generator, scale=scale)

    def place(self, *shape: int, scale: float = 1.0, **options) -> torch.Tensor:
        return self.laid(self.random(*shape, scale=scale), **options)

    def chance(self, *shape: int, probability: float) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator) < probability

    def matrix(self, n: int, k: int) -> torch.Tensor:
        return self.random(n, k, scale=max(1, k) ** -0.5)


# Elementwise ops and norms

ROWS = st.lists(st.integers(0, 4), max_size=2) | st.lists(st.integers(1, 20), min_size=1, max_size=1)
WIDTHS = sizes(0, 70, 127, 128, 129, 257, 300)


def swiglu(case: dict, inputs: Inputs) -> Trial:
    shape = (*case["rows"], case["size"])
    arguments = {name: inputs.place(*shape, scale=case["scale"], repeat=True) for name in ("gate", "up")}
    golden = reference(qvl_kernels.swiglu, double(arguments))
    slack = (inputs.eps + 16 * SINGLE * (1 + arguments["gate"].double().abs())) * golden[0].abs() + inputs.tiny
    return Trial(lambda: qvl_kernels.swiglu(**arguments), golden, (slack,))


def gelu_tanh(case: dict, inputs: Inputs) -> Trial:
    x = inputs.place(*case["rows"], case["size"], scale=case["scale"], repeat=True)
    bias = inputs.place(case["size"]) if case["bias"] else None
    golden = reference(qvl_kernels.gelu_tanh, double({"x": x, "bias": bias}))
    total = x.double() + (0 if bias is None else bias.double())
    slack = inputs.eps * golden[0].abs() + 16 * SINGLE * (total.abs() + x.double().abs()) + inputs.tiny
    return Trial(lambda: qvl_kernels.gelu_tanh(x, bias), golden, (slack,))


def _norm(name: str, case: dict, inputs: Inputs) -> Trial:
    layer, size = name.endswith("layer_norm"), case["size"]
    arguments = {"x": inputs.place(*case["rows"], size, scale=case["scale"], repeat=True), "weight": inputs.place(size)}
    if name.startswith("add"):
        arguments["residual"] = inputs.place(*case["rows"], size, scale=case["scale"], repeat=True)
    if layer:
        arguments["bias"] = inputs.place(size)
    sums = () if "residual" not in arguments else ((arguments["x"] + arguments["residual"]).double(),)
    exact = double(arguments)
    x, w = (sums or (exact["x"],))[0], exact["weight"]
    single = (8 + size / 4) * SINGLE  # of sums over the row
    if layer:
        y = torch.nn.functional.layer_norm(x, (size,), w, exact["bias"], 1e-6)
        centred = x - x.mean(-1, keepdim=True)
        r = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        moved = single * x.norm(dim=-1, keepdim=True) * r  # of the mean, in units of the result
        slack = (
            inputs.eps * y.abs()
            + (w * (moved + centred.abs() * r * (2 * moved + single))).abs()
            + 4 * SINGLE * exact["bias"].abs()
        )
    else:
        y = rms_norm_reference(x, w, 1e-6)
        slack = (1.5 * inputs.eps + single) * y.abs()
    function = getattr(qvl_kernels, name)
    return Trial(lambda: function(**arguments), (y, *sums), (slack + inputs.tiny, 0.0))


# Matmuls


def _quantised(matrix: torch.Tensor, form: tuple) -> QuantizedWeight:
    """``form``: bits, group and, of int4, whether it has zero-points and fp16 scales."""
    bits, group, zeros, half = (*form, False, False)[:4]
    dtype = torch.float16 if half else torch.bfloat16
    return quantize(matrix.float(), bits, group, zero_points=zeros, scale_dtype=dtype)


def linear(case: dict, inputs: Inputs) -> Trial:
    m, n, k = (case[name] for name in "mnk")
    x, weight = inputs.place(m, k, repeat=True), inputs.laid(inputs.matrix(n, k), repeat=True)
    bias = inputs.place(n) if case["bias"] else None
    if case["quantised"]:
        weight = inputs.laid.all(_quantised(inputs.matrix(n, k), case["quantised"]))
        vectors, tiles = (
            bounds.matmul(*as_multiplied(x, weight, isa), bias, inputs.dtype) for isa in ("portable", TILE_ISAS[0])
        )
        return Trial(lambda: qvl_kernels.quantized_linear(x, weight, bias), vectors[:1], vectors[1:], on_tiles=tiles)
    y, slack = bounds.matmul(x, weight, bias, inputs.dtype)
    return Trial(lambda: qvl_kernels.linear(x, weight, bias), (y,), (slack,))


def patch_embed(case: dict, inputs: Inputs) -> Trial:
    pixels, weight = inputs.place(case["m"], 3 * case["k"]), inputs.place(case["n"], 3, 1, case["k"], 1, dense=5)
    bias = inputs.place(case["n"]) if case["bias"] else None
    y, slack = bounds.matmul(pixels, weight.flatten(1), bias, inputs.dtype)
    return Trial(lambda: qvl_kernels.patch_embed(pixels, weight, bias), (y,), (slack,))


def linear_cross_entropy(case: dict, inputs: Inputs) -> Trial:
    tokens, vocabulary, size = (case[name] for name in "mnk")
    labels = torch.randint(0, vocabulary, (tokens,), generator=inputs.generator)
    labels[inputs.chance(tokens, probability=0.2)] = -100
    arguments = {
        "hidden": inputs.place(tokens, size, repeat=True),
        "weight": inputs.laid(inputs.matrix(vocabulary, size)),
        "labels": inputs.laid(labels),
        "label_smoothing": case["smoothing"],
        "reduction": case["reduction"],
    }
    golden = reference(qvl_kernels.linear_cross_entropy, double(arguments))
    logits, moved = bounds.matmul(arguments["hidden"], arguments["weight"], None, inputs.dtype)
    rows = (2 * moved.amax(-1) + (32 + vocabulary) * SINGLE * (1 + logits.abs().amax(-1))) * (labels != -100)
    slack = rows if case["reduction"] == "none" else rows.sum() + 8 * SINGLE * golden[0].abs()
    if case["reduction"] == "mean":
        slack = slack / max(1, int((labels != -100).sum())) + 8 * SINGLE * golden[0].abs().nan_to_num(0.0)
    return Trial(lambda: qvl_kernels.linear_cross_entropy(**arguments), golden, (slack,))


# Rotary embedding


def _tables(inputs: Inputs, *shape: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    angles = torch.rand(*shape[:-1], shape[-1] // 2, generator=inputs.generator).repeat_interleave(2, -1) * 100
    return {"cos": inputs.laid(angles.cos().to(dtype)), "sin": inputs.laid(angles.sin().to(dtype))}


def qk_norm_rope(case: dict, inputs: Inputs) -> Trial:
    b, t, kv, d = (case[name] for name in ("b", "t", "kv_heads", "half"))
    d *= 2
    arguments = {
        "q": inputs.place(b, t, kv * case["group"], d, repeat=True),
        "k": inputs.place(b, t, kv, d, repeat=True),
        "q_weight": inputs.place(d),
        "k_weight": inputs.place(d),
        **_tables(inputs, b if case["flag"] else 1, t, d, dtype=inputs.dtype),
    }
    exact = double(arguments)
    golden = reference(qvl_kernels.qk_norm_rope, exact)
    normed = (rms_norm_reference(exact[name], exact[f"{name}_weight"], 1e-6) for name in ("q", "k"))
    slack = tuple((2.5 * inputs.eps + (8 + d / 4) * SINGLE) * terms for terms in _rope_terms(normed, exact))
    return Trial(lambda: qvl_kernels.qk_norm_rope(**arguments), golden, slack)


def vision_rope(case: dict, inputs: Inputs) -> Trial:
    t, kv, d = case["t"], case["kv_heads"], 2 * case["half"]
    table_dtype = inputs.dtype if case["flag"] else torch.float32
    arguments = {
        "q": inputs.place(t, kv * case["group"], d, repeat=True),
        "k": inputs.place(t, kv, d, repeat=True),
        **_tables(inputs, t, d, dtype=table_dtype),
    }
    exact = double(arguments)
    slack = tuple((inputs.eps + 4 * SINGLE) * terms for terms in _rope_terms((exact["q"], exact["k"]), exact))
    return Trial(lambda: qvl_kernels.vision_rope(**arguments), reference(qvl_kernels.vision_rope, exact), slack)


def _rope_terms(heads, exact: dict) -> list[torch.Tensor]:
    """|x cos| + |rotate_half(x) sin|."""
    cos, sin = (exact[name].abs().unsqueeze(-2) for name in ("cos", "sin"))
    return [x.abs() * cos + rotate_half(x).abs() * sin for x in heads]


# Attention

HEADS = {"kv_heads": st.integers(1, 3), "group": st.integers(1, 3)}
HEAD_DIMS = sizes(1, 40, 64, 72, 128, 257, 512)
MASKS = st.sampled_from([None, "bool", "additive"])
SCALES = st.sampled_from([None, 1.0, 0.25, 0.0, -0.5])


def _mask(kind: str | None, full: tuple[int, ...], inputs: Inputs, low: float = -1e4) -> torch.Tensor | None:
    if kind is None:
        return None
    shape = [1 if bool(inputs.chance(1, probability=0.4)) else size for size in full]
    if kind == "bool":
        return inputs.laid(inputs.chance(*shape, probability=0.7), dense=0)
    mask = inputs.random(*shape)
    mask[inputs.chance(*shape, probability=0.2)] = low
    mask[inputs.chance(*shape, probability=0.2)] = float("-inf")
    return inputs.laid(mask, dense=0)


def attention(case: dict, inputs: Inputs) -> Trial:
    b, t, s, kv, d = (case[name] for name in ("b", "t", "s", "kv_heads", "d"))
    heads = kv * case["group"]
    if case["varlen"] is not None:
        bounds = torch.tensor([0, *case["varlen"]]).cumsum(0).int()
        n = int(bounds[-1])
        tensors = inputs.place(n, heads, d, repeat=True), inputs.place(n, kv, d, repeat=True), inputs.place(n, kv, d)
        extra = {"cu_seqlens": inputs.laid(bounds)}
    else:
        padding = None
        k, v = inputs.random(b, s, kv, d), inputs.random(b, s, kv, d)
        if case["padding"]:
            padding = inputs.chance(b, s, probability=0.7)
            k[~padding], v[~padding] = float("nan"), float("nan")  # masked keys may hold anything
        tensors = inputs.place(b, t, heads, d, repeat=True), inputs.laid(k), inputs.laid(v)
        hidden = None if padding is None else inputs.laid(padding, dense=0)
        extra = {"mask": _mask(case["mask"], (b, heads, t, s), inputs), "key_padding_mask": hidden}
    arguments = {
        **dict(zip("qkv", tensors)),
        **extra,
        "causal": case["causal"],
        "scale": case["scale"],
        "return_lse": True,
    }
    return _attention_trial(qvl_kernels.attention, arguments, extra.get("mask"), inputs)


def cross_attention(case: dict, inputs: Inputs) -> Trial:
    b, t, s, kv, d = (case[name] for name in ("b", "t", "s", "kv_heads", "d"))
    lengths = torch.randint(0, s + 1, (b,), generator=inputs.generator)
    k, v = inputs.random(b, s, kv, d), inputs.random(b, s, kv, d)
    behind = torch.arange(s)[None] >= lengths[:, None]
    k[behind], v[behind] = float("nan"), float("nan")
    arguments = {
        "q": inputs.place(b, t, kv * case["group"], d, repeat=True),
        "k": inputs.laid(k),
        "v": inputs.laid(v),
        "kv_lens": inputs.laid(lengths),
        "key_padding_mask": inputs.laid(inputs.chance(b, s, probability=0.7), dense=0) if case["padding"] else None,
        "scale": case["scale"],
    }
    return _attention_trial(qvl_kernels.cross_attention, arguments, None, inputs)


def decode_attention(case: dict, inputs: Inputs) -> Trial:
    b, t, kv, d = (case[name] for name in ("b", "t", "kv_heads", "d"))
    capacity = t + case["s"]
    lengths = torch.randint(t, capacity + 1, (b,), generator=inputs.generator)
    arguments = {
        "q": inputs.place(b, t, kv * case["group"], d, repeat=True),
        "lengths": inputs.laid(lengths.int() if case["varlen"] else lengths),
        "mask": _mask(case["mask"], (b, kv * case["group"], t, capacity), inputs),
        "scale": case["scale"],
    }
    behind = (torch.arange(capacity)[None] >= lengths[:, None])[:, None].expand(b, kv, capacity)
    exact = double(arguments)
    for name in "kv":
        if case["varlen"]:
            cache = torch.randint(-127, 128, (b, kv, capacity, d), generator=inputs.generator, dtype=torch.int8)
            scales = torch.rand(b, kv, capacity, generator=inputs.generator) / 64
            arguments |= {f"{name}_cache": inputs.laid(cache), f"{name}_scale": inputs.laid(scales, dense=0)}
            exact[f"{name}_cache"] = dequantize_cache(cache, scales, inputs.dtype).double()
        else:
            cache = inputs.random(b, kv, capacity, d)
            cache[behind] = float("nan")  # slots past the sequence's length are not read
            arguments[f"{name}_cache"] = inputs.laid(cache)
            exact[f"{name}_cache"] = cache.double()
    return _attention_trial(qvl_kernels.decode_attention, arguments, arguments["mask"], inputs, exact)


def _attention_trial(
    function, arguments: dict, mask: torch.Tensor | None, inputs: Inputs, exact: dict | None = None
) -> Trial:
    exact = double(arguments) if exact is None else exact
    value, key = ("v_cache", "k_cache") if "k_cache" in exact else ("v", "k")
    golden = reference(function, exact)
    magnitude = reference(function, {**exact, value: exact[value].abs()})[0]
    keys = exact[key].transpose(1, 2) if key == "k_cache" else exact[key]
    added = 1e4 if mask is not None and mask.is_floating_point() else 0.0
    slack, scores = bounds.attention(
        exact["q"], keys, golden[0], magnitude, inputs.dtype, scale=arguments["scale"], added=added
    )
    if len(golden) > 1:
        scores = scores.movedim(-2, -3)[..., 0] + 2 * SINGLE * golden[1].abs().nan_to_num(posinf=0.0)
    return Trial(lambda: function(**arguments), golden, (slack, scores))


# Whole layers

FORMATS = st.sampled_from(
    [
        None,
        (8, 128),
        *((4, group, zeros, half) for group in (32, 64, 128) for zeros in (False, True) for half in (0, 1)),
    ]
)


def _quantised_matmul(
    x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    if isinstance(weight, QuantizedWeight):
        x, weight = rounded_activations(x.float(), weight).double(), dequantize(weight).double()
    return torch.nn.functional.linear(x, weight, bias)


def _layer_slack(change: torch.Tensor, x: torch.Tensor, quantised: bool, inputs: Inputs) -> float:
    """Error bound of each element; a rounding tie that flips moves an activation of a quantised matmul by 1/127 of the
    largest.
    """
    if not x.numel():
        return 0.0
    unit = 60 * SINGLE if inputs.dtype == torch.float32 else 8 * inputs.eps
    return max(unit, 0.05 if quantised else 0.0) * float(change.abs().max() + x.abs().max())


def decoder_layer(case: dict, inputs: Inputs) -> Trial:
    b, t, past, kv, c, f = (case[name] for name in ("b", "t", "past", "kv_heads", "c", "f"))
    heads, d = kv * case["group"], 2 * case["half"]
    shapes = {
        "q": (heads * d, c),
        "k": (kv * d, c),
        "v": (kv * d, c),
        "o": (c, heads * d),
        "gate": (f, c),
        "up": (f, c),
        "down": (c, f),
    }
    formats = dict(zip(shapes, case["formats"] or [None] * 7))
    weights = DecoderWeights(
        **{
            name: inputs.matrix(*shape) if formats[name] is None else _quantised(inputs.matrix(*shape), formats[name])
            for name, shape in shapes.items()
        },
        **{
            name: 1 + 0.1 * inputs.random(size)
            for name, size in (("input_norm", c), ("post_norm", c), ("q_norm", d), ("k_norm", d))
        },
        **{f"{name}_bias": inputs.random(shapes[name][0]) for name in "qkvo" if case["bias"]},
    )
    weights = inputs.laid.all(weights)
    x, tables = inputs.place(b, t, c, dense=3), _tables(inputs, b if case["flag"] else 1, t, d, dtype=inputs.dtype)
    values = [inputs.random(b, kv, past + t + case["room"], d) for _ in range(2)]
    for value in values:
        value[:, :, past:] = float("nan")  # unwritten slots are not read
    caches = [inputs.laid(value, writable=True) for value in values]
    mask = _mask(
        case["mask"], (b, heads, t, past + t), inputs, low=-30.0
    )  # with all keys masked by -1e4, fp32 scores keep three digits
    exact_caches = [value.double() for value in values]
    exact_weights = DecoderWeights(*(w.double() if isinstance(w, torch.Tensor) else w for w in weights))
    with mock.patch("qvl_kernels.ops.decoder_layer.reference.linear_reference", _quantised_matmul):
        y = decoder_layer_reference(
            x.double(),
            exact_weights,
            tables["cos"].double(),
            tables["sin"].double(),
            *exact_caches,
            past,
            mask.double() if mask is not None and mask.is_floating_point() else mask,
            heads,
            1e-6,
            d**-0.5,
        )
    quantised = any(formats.values())
    slack = _layer_slack(y - x.double(), x, quantised, inputs)
    written = []
    for cache, golden in zip(caches, exact_caches):
        allowed = torch.zeros(golden.shape, dtype=torch.float64)
        allowed[:, :, past : past + t] = _layer_slack(golden[:, :, past : past + t], x, quantised, inputs)
        written.append((cache, golden, allowed))

    def call():
        if case["formats"] or case["prepared"]:
            kind = qvl_kernels.QuantizedDecoderLayer if case["formats"] else qvl_kernels.PreparedDecoderLayer
            layer = kind(weights, num_heads=heads, kv_heads=kv, eps=1e-6, scale=d**-0.5)
            return layer(x, **tables, k_cache=caches[0], v_cache=caches[1], past=past, mask=mask)
        return qvl_kernels.decoder_layer(
            x, weights, **tables, k_cache=caches[0], v_cache=caches[1], past=past, mask=mask, num_heads=heads
        )

    return Trial(call, (y,), (slack,), tuple(written))


def vision_block(case: dict, inputs: Inputs) -> Trial:
    heads, d, f = case["heads"], 2 * case["half"], case["f"]
    c, bounds = heads * d, torch.tensor([0, *case["lengths"]]).cumsum(0).int()
    tokens = int(bounds[-1])
    shapes = {"qkv": (3 * c, c), "proj": (c, c), "fc1": (f, c), "fc2": (c, f)}
    formats = dict(zip(shapes, case["formats"] or [None] * 4))
    weights = inputs.laid.all(
        VisionWeights(
            **{
                f"{name}_w": inputs.matrix(*shape)
                if formats[name] is None
                else _quantised(inputs.matrix(*shape), formats[name])
                for name, shape in shapes.items()
            },
            **{f"{name}_b": 0.1 * inputs.random(shape[0]) for name, shape in shapes.items()},
            **{f"norm{i}_{part}": float(part == "w") + 0.1 * inputs.random(c) for i in (1, 2) for part in "wb"},
        )
    )
    x, tables, cu_seqlens = (
        inputs.place(tokens, c, dense=2),
        _tables(inputs, tokens, d, dtype=torch.float32),
        inputs.laid(bounds),
    )
    exact_weights = VisionWeights(*(w.double() if isinstance(w, torch.Tensor) else w for w in weights))
    with mock.patch("qvl_kernels.ops.vision_block.reference.linear_reference", _quantised_matmul):
        y = vision_block_reference(
            x.double(), exact_weights, tables["cos"].double(), tables["sin"].double(), bounds, heads, 1e-6
        )
    slack = _layer_slack(y - x.double(), x, any(formats.values()), inputs)
    return Trial(
        lambda: qvl_kernels.vision_block(x, weights, **tables, cu_seqlens=cu_seqlens, num_heads=heads), (y,), (slack,)
    )


NORMS = cases(rows=ROWS, size=WIDTHS, scale=st.sampled_from([1.0, 1e-3, 100.0]))
PRODUCT = {
    "m": sizes(0, 20, 33, 64, 65, 130),
    "n": sizes(0, 40, 95, 97, 129),
    "k": sizes(0, 70, 64, 127, 128, 129, 1023, 1025),
    "bias": st.booleans(),
}
ATTENTION = {
    "b": st.integers(0, 3),
    "t": sizes(0, 9, 17, 33, 70, 150),
    "s": sizes(0, 40, 127, 129, 300, 513),
    **HEADS,
    "d": HEAD_DIMS,
    "scale": SCALES,
    "mask": MASKS,
    "padding": st.booleans(),
}
ROPE = {"b": st.integers(1, 3), "t": sizes(0, 9), **HEADS, "half": sizes(1, 20, 32, 64, 65, 256), "flag": st.booleans()}
# Layers norm sums and heads: with very few elements these may almost vanish, which no bound covers.
DECODER = {
    "b": st.integers(0, 3),
    "t": sizes(0, 6, 17, 40),
    "past": sizes(0, 20, 130),
    "room": st.integers(0, 3),
    **HEADS,
    "half": sizes(4, 12, 16),
    "c": sizes(8, 40, 64, 129),
    "f": sizes(1, 40, 96, 97, 130),
    "bias": st.booleans(),
    "flag": st.booleans(),
    "mask": MASKS,
    "prepared": st.booleans(),
}
VISION = {
    "lengths": st.lists(sizes(0, 12, 33, 70), max_size=3),
    "heads": st.integers(2, 4),
    "half": sizes(2, 12, 16),
    "f": sizes(1, 40, 96, 97, 130),
}

FUZZED = {
    "attention": (
        attention,
        cases(**ATTENTION, causal=st.booleans(), varlen=st.none() | st.lists(sizes(0, 9, 33, 140), max_size=4)),
    ),
    "cross_attention": (cross_attention, cases(**ATTENTION)),
    "decode_attention": (decode_attention, cases(**{**ATTENTION, "t": sizes(1, 4, 9)}, varlen=st.booleans())),
    "rms_norm": (lambda *arguments: _norm("rms_norm", *arguments), NORMS),
    "add_rms_norm": (lambda *arguments: _norm("add_rms_norm", *arguments), NORMS),
    "layer_norm": (lambda *arguments: _norm("layer_norm", *arguments), NORMS),
    "add_layer_norm": (lambda *arguments: _norm("add_layer_norm", *arguments), NORMS),
    "qk_norm_rope": (qk_norm_rope, cases(**ROPE)),
    "vision_rope": (vision_rope, cases(**ROPE)),
    "swiglu": (swiglu, cases(rows=ROWS, size=WIDTHS, scale=st.sampled_from([1.0, 10.0]))),
    "gelu_tanh": (gelu_tanh, cases(rows=ROWS, size=WIDTHS, scale=st.sampled_from([1.0, 10.0]), bias=st.booleans())),
    "patch_embed": (patch_embed, cases(**{**PRODUCT, "n": sizes(1, 40, 97), "k": sizes(1, 40)})),
    "linear": (linear, cases(**PRODUCT, quantised=st.none())),
    "quantized_linear": (
        linear,
        cases(**{**PRODUCT, "k": sizes(1, 70, 127, 128, 129, 1023, 1025)}, quantised=FORMATS.filter(bool)),
    ),
    "linear_cross_entropy": (
        linear_cross_entropy,
        cases(
            **{**PRODUCT, "n": sizes(1, 60, 131)},
            smoothing=st.sampled_from([0.0, 0.1]),
            reduction=st.sampled_from(["mean", "sum", "none"]),
        ),
    ),
    "decoder_layer": (decoder_layer, cases(**DECODER, formats=st.none())),
    "decoder_layer_quantised": (decoder_layer, cases(**DECODER, formats=st.lists(FORMATS, min_size=7, max_size=7))),
    "vision_block": (vision_block, cases(**VISION, formats=st.none())),
    "vision_block_quantised": (vision_block, cases(**VISION, formats=st.lists(FORMATS, min_size=4, max_size=4))),
}


def check(name: str, case: dict) -> None:
    fuzzing.CASE_FILE.write_text(repr((name, case)))
    threads = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        fuzzing.run(name, case, FUZZED[name][0](case, Inputs(case)))
    finally:
        torch.set_num_threads(threads)


def test_every_op_is_here():
    assert {name.removesuffix("_quantised") for name in FUZZED} == set(OPS)


@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUZZED)
def test_between_guard_pages(name, count):
    fuzzing.CASE_FILE.parent.mkdir(exist_ok=True)

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(FUZZED[name][1])
    def run(case):
        check(name, case)

    run()
