"""What every public function says to arguments it cannot take: TypeError or ValueError that names the function."""

import pytest
import torch

import qvl_kernels
from qvl_kernels.quant import quantize

B, T, S, H, HKV, D, C, F, N, V = 2, 3, 5, 4, 2, 8, 16, 24, 6, 11


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _decoder_weights(**changes) -> qvl_kernels.DecoderWeights:
    q, kv = H * D, HKV * D
    weights = qvl_kernels.DecoderWeights(
        _rand(C), _rand(q, C), _rand(kv, C), _rand(kv, C), _rand(D), _rand(D), _rand(C, q), _rand(C), _rand(F, C), _rand(F, C),
        _rand(C, F), q_bias=_rand(q),
    )  # fmt: skip
    return weights._replace(**changes)


def _vision_weights(**changes) -> qvl_kernels.VisionWeights:
    weights = qvl_kernels.VisionWeights(
        _rand(C), _rand(C), _rand(3 * C, C), _rand(3 * C), _rand(C, C), _rand(C), _rand(C), _rand(C), _rand(F, C), _rand(F),
        _rand(C, F), _rand(C),
    )  # fmt: skip
    return weights._replace(**changes)


def _bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


INT8_CACHES = {name: torch.ones(B, HKV, S, D, dtype=torch.int8) for name in ("k_cache", "v_cache")}

# Good arguments of every public function; each test below spoils one.
GOOD = {
    "attention": lambda: {
        "q": _rand(B, T, H, D), "k": _rand(B, S, HKV, D), "v": _rand(B, S, HKV, D), "mask": _rand(B, 1, T, S),
        "key_padding_mask": torch.ones(B, S, dtype=torch.bool),
    },
    "cross_attention": lambda: {
        "q": _rand(B, T, H, D), "k": _rand(B, S, HKV, D), "v": _rand(B, S, HKV, D), "kv_lens": torch.tensor([S, 1]),
        "key_padding_mask": torch.ones(B, S, dtype=torch.bool),
    },
    "decode_attention": lambda: {
        "q": _rand(B, 1, H, D), "k_cache": _rand(B, HKV, S, D), "v_cache": _rand(B, HKV, S, D),
        "lengths": torch.tensor([S, 1]), "mask": _rand(B, 1, 1, S),
    },
    "decoder_layer": lambda: {
        "x": _rand(B, T, C), "weights": _decoder_weights(), "cos": _rand(1, T, D), "sin": _rand(1, T, D),
        "k_cache": _rand(B, HKV, S, D), "v_cache": _rand(B, HKV, S, D), "past": 1, "num_heads": H, "mask": _rand(B, 1, T, S),
    },
    "gelu_tanh": lambda: {"x": _rand(N, F), "bias": _rand(F)},
    "layer_norm": lambda: {"x": _rand(N, C), "weight": _rand(C), "bias": _rand(C)},
    "add_layer_norm": lambda: {"x": _rand(N, C), "residual": _rand(N, C), "weight": _rand(C), "bias": _rand(C)},
    "linear": lambda: {"x": _rand(N, C), "weight": _rand(F, C), "bias": _rand(F)},
    "linear_cross_entropy": lambda: {"hidden": _rand(N, C), "weight": _rand(V, C), "labels": torch.arange(N)},
    "patch_embed": lambda: {"pixels": _rand(N, 24), "weight": _rand(C, 3, 2, 2, 2), "bias": _rand(C)},
    "qk_norm_rope": lambda: {
        "q": _rand(B, T, H, D), "k": _rand(B, T, HKV, D), "q_weight": _rand(D), "k_weight": _rand(D), "cos": _rand(1, T, D),
        "sin": _rand(1, T, D),
    },
    "quantized_linear": lambda: {"x": _rand(N, 2 * F), "weight": quantize(_rand(F, 2 * F), 4, group=32), "bias": _rand(F)},
    "rms_norm": lambda: {"x": _rand(N, C), "weight": _rand(C)},
    "add_rms_norm": lambda: {"x": _rand(N, C), "residual": _rand(N, C), "weight": _rand(C)},
    "swiglu": lambda: {"gate": _rand(N, F), "up": _rand(N, F)},
    "vision_block": lambda: {
        "x": _rand(N, C), "weights": _vision_weights(), "cos": _rand(N, D), "sin": _rand(N, D),
        "cu_seqlens": _bounds(0, 2, N), "num_heads": 2,
    },
    "vision_rope": lambda: {"q": _rand(N, H, D), "k": _rand(N, H, D), "cos": _rand(N, D), "sin": _rand(N, D)},
}  # fmt: skip


def _tensors(*, floating: bool = False, but: tuple[str, ...] = ()) -> list:
    """(op, argument) of every tensor argument but those named, those of the weights as "weights.name"."""
    found = []
    for op, make in GOOD.items():
        for name, value in make().items():
            items = [(name, value)]
            if isinstance(value, tuple):
                items = [(f"{name}.{field}", tensor) for field, tensor in value._asdict().items()]
            for path, tensor in items:
                if not isinstance(tensor, torch.Tensor) or (floating and not tensor.is_floating_point()):
                    continue
                if f"{op}-{path}" not in but:
                    found.append(pytest.param(op, path, id=f"{op}-{path}"))
    return found


def _spoiled(op: str, path: str, change) -> dict:
    arguments = GOOD[op]()
    name, _, field = path.partition(".")
    if field:
        weights = arguments[name]
        arguments[name] = weights._replace(**{field: change(getattr(weights, field))})
    else:
        arguments[name] = change(arguments[name])
    return arguments


def _raises(op: str, arguments: dict, match: str = "") -> None:
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=f"{op}: .*{match}"):
        getattr(qvl_kernels, op)(**arguments)


@pytest.mark.parametrize("op", GOOD)
def test_good_arguments_run(op):
    with torch.no_grad(), qvl_kernels.use_backend("cpp"):
        getattr(qvl_kernels, op)(**GOOD[op]())


def test_every_public_function_is_here():
    functions = {name for name in qvl_kernels.__all__ if callable(getattr(qvl_kernels, name))}
    others = {"DecoderWeights", "PreparedCache", "PreparedDecoderLayer", "QuantizedDecoderLayer", "VisionWeights", "backends", "cpu_info", "fallbacks", "use_backend", "use_huge_pages"}
    assert set(GOOD) == functions - others


@pytest.mark.parametrize(("op", "path"), _tensors())
def test_not_a_tensor(op, path):
    _raises(op, _spoiled(op, path, lambda x: "text"))


@pytest.mark.parametrize(("op", "path"), _tensors())
def test_other_device(op, path):
    _raises(op, _spoiled(op, path, lambda x: x.to("meta")), match="meta")


@pytest.mark.parametrize(("op", "path"), _tensors())
def test_other_dtype(op, path):
    _raises(op, _spoiled(op, path, lambda x: x.to(torch.bfloat16 if x.dtype == torch.float32 else torch.float32)))


@pytest.mark.parametrize(("op", "path"), _tensors(floating=True))
def test_integers(op, path):
    _raises(op, _spoiled(op, path, lambda x: x.to(torch.int32)))


@pytest.mark.parametrize(
    ("op", "path"), _tensors(but=("rms_norm-x", "layer_norm-x", "linear-x", "quantized_linear-x", "gelu_tanh-x"))  # any number is accepted there
)
def test_one_dimension_more(op, path):
    _raises(op, _spoiled(op, path, lambda x: x[None]))


@pytest.mark.parametrize(("op", "path"), _tensors(but=("decoder_layer-mask",)))  # only its first past + T keys are read
def test_longer_last_dimension(op, path):
    _raises(op, _spoiled(op, path, lambda x: torch.cat([x, x[..., :1]], -1)))


MASKS = ("attention-mask", "decode_attention-mask", "decoder_layer-mask")


def _strided(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize(("op", "path"), _tensors(floating=True, but=MASKS))
def test_last_dimension_not_contiguous(op, path):
    _raises(op, _spoiled(op, path, _strided), match="contiguous")


@pytest.mark.parametrize("op", [name.removesuffix("-mask") for name in MASKS])
def test_masks_may_have_any_strides(op):
    with torch.no_grad():
        out = getattr(qvl_kernels, op)(**_spoiled(op, "mask", _strided))
        torch.testing.assert_close(out, getattr(qvl_kernels, op)(**GOOD[op]()))


@pytest.mark.parametrize(
    ("op", "changes", "match"),
    [
        ("attention", {"q": _rand(B, T, 3, D)}, "multiple"),
        ("attention", {"k": _rand(B, S, 0, D), "v": _rand(B, S, 0, D)}, "multiple"),
        ("attention", {"k": _rand(B, S, HKV, D + 2), "v": _rand(B, S, HKV, D + 2)}, "head_dim"),
        ("attention", {"k": _rand(1, S, HKV, D), "v": _rand(1, S, HKV, D)}, "batch"),
        ("attention", {"mask": _rand(B, 1, T, S - 1)}, "broadcast"),
        ("attention", {"mask": _rand(T, S)}, "broadcast"),
        ("attention", {"dropout_p": 1.0}, "dropout_p"),
        ("attention", {"cu_seqlens": _bounds(0, N)}, "dimensions|excludes"),
        ("cross_attention", {"kv_lens": torch.tensor([S + 1, 0])}, "kv_lens"),
        ("cross_attention", {"kv_lens": torch.tensor([-1, 0])}, "kv_lens"),
        ("cross_attention", {"q": _rand(B, T, 3, D)}, "multiple"),
        ("cross_attention", {"dropout_p": -0.1}, "dropout_p"),
        ("decode_attention", {"lengths": S + 1}, "lengths"),
        ("decode_attention", {"lengths": 0}, "lengths"),
        ("decode_attention", {"lengths": 2.5}, "lengths"),
        ("decode_attention", {"q": _rand(B, 1, 3, D)}, "multiple"),
        ("decode_attention", {"k_scale": _rand(B, HKV, S)}, "together"),
        ("decode_attention", {"k_scale": _rand(B, HKV, S), "v_scale": _rand(B, HKV, S)}, "int8"),
        ("decode_attention", {**INT8_CACHES, "k_scale": _rand(B, HKV, S), "v_scale": _rand(B, HKV, S + 1)}, "v_scale"),
        ("decode_attention", {**INT8_CACHES, "k_scale": _rand(B, HKV, S), "v_scale": torch.ones(B, HKV, S).long()}, "v_scale"),
        ("decode_attention", {**INT8_CACHES, "q": _rand(B, 1, H, D + 2), "k_scale": _rand(B, HKV, S), "v_scale": _rand(B, HKV, S)}, "head_dim"),
        ("decoder_layer", {"past": 3}, "cache"),
        ("decoder_layer", {"past": -1}, "cache"),
        ("decoder_layer", {"num_heads": 3}, "multiple"),
        ("decoder_layer", {"num_heads": 8}, "must have shape"),
        ("decoder_layer", {"x": _rand(T, B, C).transpose(0, 1)}, "contiguous"),
        ("decoder_layer", {"mask": _rand(B, 1, T, 3)}, "broadcast"),
        ("decoder_layer", {"weights": _decoder_weights(o_bias=_rand(C + 1))}, "o_bias"),
        ("linear", {"x": torch.tensor(1.0)}, "x"),
        ("linear_cross_entropy", {"labels": torch.full((N,), V)}, "labels"),
        ("linear_cross_entropy", {"labels": torch.full((N,), -1)}, "labels"),
        ("linear_cross_entropy", {"reduction": "max"}, "reduction"),
        ("linear_cross_entropy", {"label_smoothing": 1.5}, "label_smoothing"),
        ("quantized_linear", {"x": torch.tensor(1.0)}, "scalar"),
        ("quantized_linear", {"weight": _rand(F, 2 * F)}, "QuantizedWeight"),
        ("quantized_linear", {"weight": quantize(_rand(F, 2 * F), 8)._replace(scales=_rand(F, 2))}, "scales"),
        ("quantized_linear", {"weight": quantize(_rand(F, 2 * F), 8)._replace(in_features=F)}, "inputs"),
        ("rms_norm", {"x": torch.tensor(1.0)}, "scalar"),
        ("swiglu", {"gate": torch.tensor(1.0), "up": torch.tensor(1.0)}, "scalar"),
        ("qk_norm_rope", {"cos": _rand(3, T, D), "sin": _rand(3, T, D)}, "cos"),
        ("vision_rope", {"q": _rand(N, H, 7), "k": _rand(N, H, 7)}, "even"),
        ("vision_block", {"num_heads": 3}, "num_heads"),
        ("vision_block", {"num_heads": 0}, "num_heads"),
        ("vision_block", {"cu_seqlens": _bounds(0, N + 1)}, "cu_seqlens"),
        ("vision_block", {"cu_seqlens": _bounds(0, 4, 2, N)}, "cu_seqlens"),
        ("vision_block", {"cu_seqlens": _bounds(1, N)}, "cu_seqlens"),
        ("vision_block", {"cu_seqlens": _bounds()}, "cu_seqlens"),
    ],
)  # fmt: skip
def test_values_out_of_range(op, changes, match):
    _raises(op, {**GOOD[op](), **changes}, match=match)


def test_packed_sequences_must_rise_to_the_length():
    packed = _rand(N, H, D)
    for bounds in (_bounds(0, 4), _bounds(0, 5, 3, N), _bounds(-1, N), _bounds(0, N).long()):
        _raises("attention", {"q": packed, "k": packed, "v": packed, "cu_seqlens": bounds}, match="cu_seqlens")


@pytest.mark.parametrize("op", ["decode_attention", "decoder_layer", "vision_block"])
def test_inference_only_functions_refuse_gradients(op):
    arguments = GOOD[op]()
    first = next(iter(arguments))
    arguments[first].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op} has no backward"):
        getattr(qvl_kernels, op)(**arguments)


def test_lengths_are_checked_where_tracing_hides_them():
    packed = _rand(N, H, D)
    compiled = torch.compile(qvl_kernels.attention, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 6"):
        compiled(packed, packed, packed, cu_seqlens=_bounds(0, N + 100))
    arguments = GOOD["cross_attention"]()
    compiled = torch.compile(qvl_kernels.cross_attention, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=r"key lengths must lie in \[0, 5\], got 99"):
        compiled(**{**arguments, "kv_lens": torch.tensor([99, 1])})
