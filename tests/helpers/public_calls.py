"""Valid calls of everything public in qvl_kernels; tests replace their arguments one by one with invalid ones."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch

import qvl_kernels
from qvl_kernels import quantization
from qvl_kernels.quantization import (
    check_weight,
    dequantize,
    quantize,
    quantize_activations,
    rounded_activations,
)

SIZES = {"B": 2, "T": 3, "S": 5, "H": 4, "HKV": 2, "D": 8, "C": 32, "F": 24, "N": 6, "V": 11, "K": 48, "P": 2}
PAST, VISION_HEADS = 1, 2


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def sizes(**changes: int) -> SimpleNamespace:
    return SimpleNamespace(**{**SIZES, **changes})


def _bool(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def decoder_weights(n: SimpleNamespace) -> qvl_kernels.DecoderWeights:
    q, kv = n.H * n.D, n.HKV * n.D
    return qvl_kernels.DecoderWeights(
        rand(n.C),
        rand(q, n.C),
        rand(kv, n.C),
        rand(kv, n.C),
        rand(n.D),
        rand(n.D),
        rand(n.C, q),
        rand(n.C),
        rand(n.F, n.C),
        rand(n.F, n.C),
        rand(n.C, n.F),
        rand(q),
        rand(kv),
        rand(kv),
        rand(n.C),
    )


def quantised_weights(n: SimpleNamespace) -> qvl_kernels.DecoderWeights:
    w = decoder_weights(n)
    return w._replace(**{name: quantize(getattr(w, name), 8) for name in ("q", "o", "gate", "up")})


def vision_weights(n: SimpleNamespace) -> qvl_kernels.VisionWeights:
    return qvl_kernels.VisionWeights(
        rand(n.C),
        rand(n.C),
        rand(3 * n.C, n.C),
        rand(3 * n.C),
        rand(n.C, n.C),
        rand(n.C),
        rand(n.C),
        rand(n.C),
        rand(n.F, n.C),
        rand(n.F),
        rand(n.C, n.F),
        rand(n.C),
    )


def _qkv(n: SimpleNamespace) -> dict:
    return {"q": rand(n.B, n.T, n.H, n.D), "k": rand(n.B, n.S, n.HKV, n.D), "v": rand(n.B, n.S, n.HKV, n.D)}


def _caches(n: SimpleNamespace) -> dict:
    return {name: rand(n.B, n.HKV, n.S, n.D) + i for i, name in enumerate(("k_cache", "v_cache"))}


def _joined_caches(n: SimpleNamespace) -> dict:
    caches = {name: torch.ones(n.B, n.HKV, n.S, n.D, dtype=torch.int8) for name in ("k_cache", "v_cache")}
    return {**caches, "k_scale": rand(n.B, n.HKV, n.S), "v_scale": rand(n.B, n.HKV, n.S)}


def _layer_call(n: SimpleNamespace) -> dict:
    return {
        "x": rand(n.B, n.T, n.C),
        "cos": rand(1, n.T, n.D),
        "sin": rand(1, n.T, n.D),
        **_caches(n),
        "past": PAST,
        "mask": rand(n.B, 1, n.T, n.S),
    }


def _heads(n: SimpleNamespace) -> dict:
    return {"num_heads": n.H, "kv_heads": n.HKV, "eps": 1e-6, "scale": 0.3}


def _made(kind: type, weights: Callable, n: SimpleNamespace):
    return kind(weights(n), **_heads(n))


def _use_made(kind: type) -> Callable:
    """Calls the layer that was made of the arguments, so that a wrong argument changes a result."""

    def make(**arguments) -> torch.Tensor:
        layer = kind(**arguments)
        n = sizes()
        return layer(**_layer_call(n))

    return make


def _use_cache(k_cache: torch.Tensor, v_cache: torch.Tensor) -> list[torch.Tensor]:
    n = sizes()
    call = {name: value for name, value in _layer_call(n).items() if "cache" not in name}
    layer = _made(qvl_kernels.PreparedDecoderLayer, decoder_weights, n)
    return qvl_kernels.PreparedDecoderLayer.run([layer], caches=[qvl_kernels.PreparedCache(k_cache, v_cache)], **call)


def _run(kind: type, weights: Callable) -> Callable:
    def make(n: SimpleNamespace) -> dict:
        call = {name: value for name, value in _layer_call(n).items() if "cache" not in name}
        return {
            "layers": [_made(kind, weights, n) for _ in range(2)],
            "caches": [qvl_kernels.PreparedCache(**_caches(n)) for _ in range(2)],
            **call,
        }

    return make


def _call(kind: type, weights: Callable) -> tuple[Callable, Callable]:
    return kind.__call__, lambda n: {"self": _made(kind, weights, n), **_layer_call(n)}


def _in_block(**arguments) -> None:
    with qvl_kernels.use_backend(**arguments):
        pass


Q, PLAIN, QUANTISED = qvl_kernels, qvl_kernels.PreparedDecoderLayer, qvl_kernels.QuantizedDecoderLayer

# Public name, with a suffix where it has several calls -> (function, sizes -> valid arguments).
CALLS: dict[str, tuple[Callable, Callable[[SimpleNamespace], dict]]] = {
    "attention": (
        Q.attention,
        lambda n: {
            **_qkv(n),
            "mask": rand(n.B, 1, n.T, n.S),
            "key_padding_mask": _bool(n.B, n.S),
            "causal": True,
            "scale": 0.3,
            "dropout_p": 0.0,
            "return_lse": True,
        },
    ),
    "attention varlen": (
        Q.attention,
        lambda n: {
            "q": rand(n.N, n.H, n.D),
            "k": rand(n.N, n.HKV, n.D),
            "v": rand(n.N, n.HKV, n.D),
            "cu_seqlens": _bounds(0, n.N // 3, n.N),
        },
    ),
    "cross_attention": (
        Q.cross_attention,
        lambda n: {
            **_qkv(n),
            "kv_lens": torch.full((n.B,), n.S),
            "key_padding_mask": _bool(n.B, n.S),
            "scale": 0.3,
            "dropout_p": 0.0,
        },
    ),
    "decode_attention": (
        Q.decode_attention,
        lambda n: {
            "q": rand(n.B, n.T, n.H, n.D),
            **_caches(n),
            "lengths": torch.full((n.B,), n.S),
            "mask": rand(n.B, 1, n.T, n.S),
            "scale": 0.3,
        },
    ),
    "decode_attention int8": (
        Q.decode_attention,
        lambda n: {"q": rand(n.B, n.T, n.H, n.D), **_joined_caches(n), "lengths": n.S},
    ),
    "decoder_layer": (
        Q.decoder_layer,
        lambda n: {**_layer_call(n), "weights": decoder_weights(n), "num_heads": n.H, "eps": 1e-6, "scale": 0.3},
    ),
    "PreparedCache": (_use_cache, _caches),
    "PreparedDecoderLayer": (_use_made(PLAIN), lambda n: {"weights": decoder_weights(n), **_heads(n)}),
    "PreparedDecoderLayer.__call__": _call(PLAIN, decoder_weights),
    "PreparedDecoderLayer.run": (PLAIN.run, _run(PLAIN, decoder_weights)),
    "QuantizedDecoderLayer": (_use_made(QUANTISED), lambda n: {"weights": quantised_weights(n), **_heads(n)}),
    "QuantizedDecoderLayer.__call__": _call(QUANTISED, quantised_weights),
    "QuantizedDecoderLayer.run": (QUANTISED.run, _run(QUANTISED, quantised_weights)),
    "gelu_tanh": (Q.gelu_tanh, lambda n: {"x": rand(n.N, n.F), "bias": rand(n.F)}),
    "layer_norm": (Q.layer_norm, lambda n: {"x": rand(n.N, n.C), "weight": rand(n.C), "bias": rand(n.C), "eps": 1e-6}),
    "add_layer_norm": (
        Q.add_layer_norm,
        lambda n: {
            "x": rand(n.N, n.C),
            "residual": rand(n.N, n.C) + 1,
            "weight": rand(n.C),
            "bias": rand(n.C),
            "eps": 1e-6,
        },
    ),
    "rms_norm": (Q.rms_norm, lambda n: {"x": rand(n.N, n.C), "weight": rand(n.C), "eps": 1e-6, "offset": 0.0}),
    "add_rms_norm": (
        Q.add_rms_norm,
        lambda n: {"x": rand(n.N, n.C), "residual": rand(n.N, n.C) + 1, "weight": rand(n.C), "eps": 1e-6},
    ),
    "linear": (Q.linear, lambda n: {"x": rand(n.N, n.C), "weight": rand(n.F, n.C), "bias": rand(n.F)}),
    "linear_cross_entropy": (
        Q.linear_cross_entropy,
        lambda n: {
            "hidden": rand(n.N, n.C),
            "weight": rand(n.V, n.C),
            "labels": torch.arange(n.N),
            "ignore_index": -100,
            "label_smoothing": 0.1,
            "reduction": "mean",
        },
    ),
    "patch_embed": (
        Q.patch_embed,
        lambda n: {"pixels": rand(n.N, 3 * n.P**3), "weight": rand(n.C, 3, n.P, n.P, n.P), "bias": rand(n.C)},
    ),
    "qk_norm_rope": (
        Q.qk_norm_rope,
        lambda n: {
            "q": rand(n.B, n.T, n.H, n.D),
            "k": rand(n.B, n.T, n.HKV, n.D),
            "q_weight": rand(n.D),
            "k_weight": rand(n.D),
            "cos": rand(1, n.T, n.D),
            "sin": rand(1, n.T, n.D),
            "eps": 1e-6,
        },
    ),
    "quantized_linear": (
        Q.quantized_linear,
        lambda n: {"x": rand(n.N, n.K), "weight": quantize(rand(n.F, n.K), 4, 32, zero_points=True), "bias": rand(n.F)},
    ),
    "swiglu": (Q.swiglu, lambda n: {"gate": rand(n.N, n.F), "up": rand(n.N, n.F)}),
    "vision_block": (
        Q.vision_block,
        lambda n: {
            "x": rand(n.N, n.C),
            "weights": vision_weights(n),
            "cos": rand(n.N, n.C // VISION_HEADS),
            "sin": rand(n.N, n.C // VISION_HEADS),
            "cu_seqlens": _bounds(0, n.N // 3, n.N),
            "num_heads": VISION_HEADS,
            "eps": 1e-6,
        },
    ),
    "vision_block quantised": (
        Q.vision_block,
        lambda n: {
            "x": rand(n.N, n.C),
            "weights": vision_weights(n)._replace(
                qkv_w=quantize(rand(3 * n.C, n.C), 8), fc2_w=quantize(rand(n.C, n.F), 4, 32)
            ),
            "cos": rand(n.N, n.C // VISION_HEADS),
            "sin": rand(n.N, n.C // VISION_HEADS),
            "cu_seqlens": _bounds(0, n.N),
            "num_heads": VISION_HEADS,
            "eps": 1e-6,
        },
    ),
    "vision_rope": (
        Q.vision_rope,
        lambda n: {"q": rand(n.N, n.H, n.D), "k": rand(n.N, n.H, n.D), "cos": rand(n.N, n.D), "sin": rand(n.N, n.D)},
    ),
    "use_backend": (_in_block, lambda n: {"name": "reference"}),
    "use_huge_pages": (Q.use_huge_pages, lambda n: {"tensors": [rand(n.N, n.C), rand(n.C)]}),
    **{name: (getattr(Q, name), lambda n: {}) for name in ("backends", "cpu_info", "fallbacks")},
    "quant.quantize": (
        quantize,
        lambda n: {
            "weight": rand(n.F, n.K),
            "bits": 4,
            "group": 32,
            "zero_points": True,
            "scale_dtype": torch.float16,
        },
    ),
    "quant.dequantize": (
        dequantize,
        lambda n: {"quantized": quantize(rand(n.F, n.K), 4, 32), "dtype": torch.float32},
    ),
    "quant.quantize_activations": (quantize_activations, lambda n: {"x": rand(n.N, n.K), "group": 32}),
    "quant.rounded_activations": (
        rounded_activations,
        lambda n: {"x": rand(n.N, n.K), "weight": quantize(rand(n.F, n.K), 8)},
    ),
    "quant.check_weight": (
        check_weight,
        lambda n: {
            "op": "check_weight",
            "weight": quantize(rand(n.F, n.K), 8),
            "device": torch.device("cpu"),
        },
    ),
}
INFERENCE_ONLY = {
    name
    for name in CALLS
    if name.startswith(("decode_attention", "decoder_layer", "Prepared", "Quantized", "vision_block"))
}


def public_names() -> Iterator[tuple[str, object]]:
    """Every public name except constants: functions, classes with their public methods, and tuples of tensors."""
    for prefix, module in (("", qvl_kernels), ("quant.", quantization)):
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                yield prefix + name, value
            if inspect.isclass(value) and not issubclass(value, tuple):
                members = itertools.chain.from_iterable(vars(kind) for kind in value.__mro__[:-1])
                methods = {
                    member
                    for member in members
                    if callable(getattr(value, member)) and (member[0] != "_" or member == "__call__")
                }
                yield from ((f"{prefix}{name}.{method}", getattr(value, method)) for method in methods)
