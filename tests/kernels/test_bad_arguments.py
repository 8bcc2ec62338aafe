"""Invalid arguments of every public function raise TypeError or ValueError. Covers every public name, parameter and
tensor inside a tuple of weights.
"""

import contextlib
import functools
import inspect
import re

import pytest
import torch
from public_calls import CALLS, INFERENCE_ONLY, SIZES, decoder_weights, public_names, quantised_weights, rand, sizes
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

import qvl_kernels
from qvl_kernels.library import has_memory
from qvl_kernels.quantization import QuantizedWeight, dequantize
from qvl_kernels.testing import relative_error

n = sizes()
OPTIONAL = {  # arguments that may be None
    "mask",
    "key_padding_mask",
    "cu_seqlens",
    "kv_lens",
    "scale",
    "bias",
    "k_scale",
    "v_scale",
    "device",
    "weight.zeros",
    "weights.q_bias",
    "weights.k_bias",
    "weights.v_bias",
    "weights.o_bias",
}


def _paths(arguments: dict) -> list[str]:
    """Names of arguments, of the parts of tuples and of the first item of lists: "weights.q.scales", "caches.0"."""
    found = []
    for name, value in arguments.items():
        found.append(name)
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            found += [f"{name}.{rest}" for rest in _paths(value._asdict())]
        elif isinstance(value, list):
            found += [f"{name}.{rest}" for rest in _paths({"0": value[0]})]
    return found


def _at(arguments: dict, path: str):
    """The argument, or the part of one, that a path names."""
    value = arguments
    for part in path.split("."):
        value = (
            value[part]
            if isinstance(value, dict)
            else value[int(part)]
            if isinstance(value, list)
            else getattr(value, part)
        )
    return value


def _changed(value, path: str, new):
    first, _, rest = path.partition(".")
    if isinstance(value, dict):
        return {**value, first: _changed(value[first], rest, new) if rest else new}
    if isinstance(value, list):
        return [_changed(value[0], rest, new) if rest else new, *value[1:]]
    return value._replace(**{first: _changed(getattr(value, first), rest, new) if rest else new})


class _Subclass(torch.Tensor):
    pass


def _cut(x: torch.Tensor, size: int) -> torch.Tensor:
    """x after its storage was left ``size`` bytes, or that many fewer."""
    storage = x.untyped_storage()
    storage.resize_(size if size >= 0 else storage.nbytes() + size)
    return x


TYPES = {
    "None",
    "text",
    "bool",
    "tuple",
    "list",
    "object",
    "complex",
    "plain tuple",
}  # of which nothing else is taken, bool for int included
NAMES = {"use_backend": "backend"}
OTHERS = {
    "None": None,
    "text": "text",
    "bool": True,
    "huge": 2**70,
    "minus": -1,
    "nan": float("nan"),
    "infinite": float("inf"),
    "tuple": (1, 2),
    "list": [],
    "object": object(),
    "complex": 1j,
    "empty tensor": torch.empty(0),
    "scalar tensor": torch.tensor(2.0),
}
TENSORS = {
    "meta": lambda x: x.to("meta"),
    **{
        str(dtype): lambda x, dtype=dtype: x.to(dtype)
        for dtype in (
            torch.float32,
            torch.bfloat16,
            torch.float64,
            torch.int64,
            torch.int8,
            torch.bool,
            torch.complex64,
        )
    },
    "transposed": lambda x: x.transpose(-1, -2),
    "one dimension more": lambda x: x[None],
    "one dimension fewer": lambda x: x[0],
    "longer": lambda x: torch.cat((x, x[..., :1]), -1),
    "shorter": lambda x: x[..., :-1],
    "more rows": lambda x: torch.cat((x, x[:1])),
    "no rows": lambda x: x[:0],
    "no columns": lambda x: x[..., :0],
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded columns": lambda x: x[..., :1].expand(x.shape),
    "sparse": lambda x: x.to_sparse(),
    "negated when read": lambda x: torch._neg_view(-x),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "subclass": lambda x: x.as_subclass(_Subclass),
    "freed": lambda x: _cut(x, 0),
    "a freed part": lambda x: _cut(torch.cat((x, x))[len(x) :], 0),
    "cut": lambda x: _cut(x, -1),
    "cut rows apart": lambda x: _cut(torch.cat((x, x), -1)[..., : x.shape[-1]], -x.shape[-1] * x.itemsize - 1),
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


def _spoiled(value) -> dict:
    """Invalid values for a valid one, by name."""
    found = {
        what: other
        for what, other in OTHERS.items()
        if type(other) is not type(value) or isinstance(value, torch.Tensor) or other != value
    }
    if hasattr(value, "_asdict"):
        found["plain tuple"] = tuple(value)
    if isinstance(value, torch.Tensor):
        for what, change in TENSORS.items():
            with contextlib.suppress(
                IndexError, NotImplementedError, RuntimeError
            ):  # of a tensor that cannot be changed so
                found[what] = change(value.detach().clone())
    return found


def _results(call, arguments: dict) -> list[torch.Tensor]:
    """All result tensors, those written in place included."""
    found = tree_flatten([call(**arguments), [value for name, value in arguments.items() if name.endswith("_cache")]])[
        0
    ]
    return [x.to_dense() if x.layout is not torch.strided else x for x in found if isinstance(x, torch.Tensor)]


def _can_be_cloned(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_contiguous() and (x.layout is not torch.strided or has_memory(x))


def _copied(value):
    """A copy of each argument that is written to; others unchanged."""
    if isinstance(value, dict):
        return {
            name: x.clone() if name.endswith("_cache") and _can_be_cloned(x) else _copied(x)
            for name, x in value.items()
        }
    if isinstance(value, list):
        return [
            qvl_kernels.PreparedCache(x.k_cache.clone(), x.v_cache.clone())
            if type(x) is qvl_kernels.PreparedCache
            else x
            for x in value
        ]
    return value


def _fault(name: str, arguments: dict, wrong_type: bool = False) -> str | None:
    """The fault of a call's outcome: an undocumented error, or a result that differs from the reference."""
    call, _ = CALLS[name]
    again = _copied(arguments)
    try:
        results = _results(call, arguments)
    except (TypeError, ValueError) as error:
        if not any(
            op in str(error)
            for op in (NAMES.get(name) or name.removeprefix("quant.").split()[0], "decoder_layer", "PreparedCache")
        ):
            return f"an error that does not name the function: {error}"
        return f"ValueError for a wrong type: {error}" if wrong_type and isinstance(error, ValueError) else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if wrong_type:
        return "a wrong type is taken"
    with qvl_kernels.use_backend("reference"):
        expected = _results(call, again)
    for out, golden in zip(results, expected, strict=True):
        if out.shape != golden.shape or out.dtype != golden.dtype or out.device != golden.device:
            return (
                f"{out.dtype} {tuple(out.shape)} on {out.device} instead of {golden.dtype} {tuple(golden.shape)} "
                f"on {golden.device}"
            )
        if not out.is_meta:
            finite = golden.isfinite()
            if (
                not torch.equal(out[~finite].nan_to_num(), golden[~finite].nan_to_num())
                or not relative_error(out[finite], golden[finite]) < 0.03
            ):
                return f"another result, by {relative_error(out, golden):.3f}"  # int8 and bf16 have smaller errors
    return None


pytestmark = pytest.mark.filterwarnings(
    "ignore:qvl_kernels. .* runs on the reference", "ignore:Casting complex", "ignore:Sparse"
)


def test_everything_public_is_here():
    """The calls cover each function and method with every parameter, and each tuple of weights."""
    tuples = {type(_at(make(n), path)) for _, make in CALLS.values() for path in _paths(make(n))}
    calls = {}
    for name, (_, make) in CALLS.items():
        calls.setdefault(name.split()[0], set()).update(make(n))
    for name, value in public_names():
        if inspect.isclass(value) and issubclass(value, tuple):
            assert value in tuples, name
        else:
            assert calls.pop(name) == set(inspect.signature(value).parameters), name
    assert not calls, "no longer public"


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_spoiled(name):
    """One argument at a time: an error, or the right result."""
    good, faults = CALLS[name][1](n), []
    with torch.no_grad():
        assert _fault(name, good) is None
        for path in _paths(good):
            value = _at(good, path)
            for what, new in _spoiled(value).items():
                optional = path in OPTIONAL or path == "weight" and name in ("layer_norm", "rms_norm")
                wrong_type = what in TYPES and type(new) is not type(value) and not (new is None and optional)
                fault = _fault(name, _changed(_copied(good), path, new), wrong_type)
                if fault is not None:
                    faults.append(f"{path} {what}: {fault}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CALLS)
def test_sizes_of_zero(name, size):
    """All arguments agree on a size of 0: an error, or the right result."""
    with torch.no_grad():
        try:
            arguments = CALLS[name][1](sizes(**{size: 0}))
        except ValueError:  # of a cache, layer or weight that is made of them
            return
        assert _fault(name, arguments) is None


@pytest.mark.parametrize("name", CALLS)
def test_every_gradient_is_right_or_refused(name):
    call, make = CALLS[name]
    good, faults = make(n), []
    for path in _paths(good):
        value = _at(good, path)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        found = []
        for backend in (None, "reference"):
            x = value.detach().clone().requires_grad_()
            try:
                with contextlib.nullcontext() if backend is None else qvl_kernels.use_backend(backend):
                    outs = [
                        out
                        for out in tree_flatten(call(**_changed(_copied(good), path, x)))[0]
                        if isinstance(out, torch.Tensor) and out.requires_grad
                    ]
                found += (
                    torch.autograd.grad(sum((out * rand(*out.shape)).sum() for out in outs), [x], allow_unused=True)
                    if outs
                    else [None]
                )
            except (RuntimeError, ValueError) as error:
                found.append(str(error))
        ours, exact = found
        if isinstance(ours, str):
            if not re.search("has no backward|has no gradient of|needs a gradient", ours):
                faults.append(f"{path}: {ours}")
        elif (ours is None) != (exact is None) or ours is not None and not relative_error(ours, exact) < 1e-4:
            faults.append(f"{path}: another gradient")
        elif ours is None and name in INFERENCE_ONLY:
            faults.append(f"{path}: no gradient, without a word")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "name", [name for name in CALLS if not name.startswith(("quant.", "use_", "Prepared", "Quantized"))]
)
def test_forward_mode_derivatives_are_right_or_refused(name):
    """Tangents of everything at once, beside a difference quotient in fp64."""
    call, make = CALLS[name]
    leaves, structure = tree_flatten(make(n))
    floats = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    tangents = {
        i: torch.randn(leaves[i].shape, generator=torch.Generator().manual_seed(i)).to(leaves[i].dtype) for i in floats
    }

    def outs(change) -> list[torch.Tensor]:
        changed = tree_unflatten(
            [change(x, tangents[i]) if i in tangents else x for i, x in enumerate(leaves)], structure
        )
        return [out for out in tree_flatten(call(**_copied(changed)))[0] if isinstance(out, torch.Tensor)]

    step = 1e-5
    with torch.no_grad(), qvl_kernels.use_backend("reference"):
        expected = [
            (high - low) / (2 * step)
            for high, low in zip(*(outs(lambda x, t, s=s: x.double() + s * t.double()) for s in (step, -step)))
        ]
    with torch.no_grad(), forward_ad.dual_level():
        got = [forward_ad.unpack_dual(out).tangent for out in outs(forward_ad.make_dual)]
        if got:
            with qvl_kernels.use_backend("cpp"), pytest.raises(RuntimeError, match="forward-mode AD"):
                outs(forward_ad.make_dual)
    for tangent, golden in zip(got, expected, strict=True):
        assert tangent is not None and relative_error(tangent, golden) < 1e-3


@pytest.mark.parametrize("kind", [qvl_kernels.PreparedDecoderLayer, qvl_kernels.QuantizedDecoderLayer])
def test_prepared_layers_have_the_tangents_of_the_function(kind):
    good = CALLS["decoder_layer"][1](n)
    weights, heads, eps, scale = (good.pop(name) for name in ("weights", "num_heads", "eps", "scale"))
    made = kind(weights, num_heads=heads, kv_heads=n.HKV, eps=eps, scale=scale)
    tangents = []
    with torch.no_grad(), forward_ad.dual_level():
        for call in (
            made,
            functools.partial(qvl_kernels.decoder_layer, weights=weights, num_heads=heads, eps=eps, scale=scale),
        ):
            x = forward_ad.make_dual(good["x"], good["x"].flip(0))
            tangents.append(forward_ad.unpack_dual(call(**{**_copied(good), "x": x})).tangent)
    assert torch.equal(*tangents)


# Calls that must raise although a result could be right, with the message.


def _raises(op: str, match: str = "", **changes) -> None:
    call, make = CALLS[op]
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=match):
        call(**{**make(n), **changes})


@pytest.mark.parametrize(
    ("op", "changes", "match"),
    [
        ("attention", {"q": rand(n.B, n.T, 3, n.D)}, "multiple"),
        ("attention", {"k": rand(n.B, n.S, 2, n.D + 2), "v": rand(n.B, n.S, 2, n.D + 2)}, "head_dim"),
        ("attention", {"k": rand(1, n.S, 2, n.D), "v": rand(1, n.S, 2, n.D)}, "batch"),
        ("attention", {"mask": rand(n.B, 1, n.T, n.S - 1)}, "broadcast"),
        ("attention", {"mask": rand(n.T, n.S)}, "broadcast"),
        ("attention", {"dropout_p": 1.0}, "dropout_p"),
        ("attention", {"scale": float("inf")}, "scale must lie in"),
        ("attention varlen", {"mask": rand(n.B, 1, n.T, n.S)}, "excludes"),
        *(
            ("attention varlen", {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}, "cu_seqlens")
            for bounds in ([0, 4], [0, 5, 3, n.N], [-1, n.N], [])
        ),
        ("cross_attention", {"kv_lens": torch.tensor([n.S + 1, 0])}, "kv_lens"),
        ("cross_attention", {"kv_lens": torch.tensor([-1, 0])}, "kv_lens"),
        ("cross_attention", {"q": rand(n.B, n.T, 3, n.D)}, "multiple"),
        ("cross_attention", {"dropout_p": -0.1}, "dropout_p"),
        ("decode_attention", {"lengths": n.S + 1}, "lengths"),
        ("decode_attention", {"lengths": 0}, "lengths"),
        ("decode_attention", {"lengths": 2**70}, "lengths"),
        ("decode_attention", {"lengths": torch.tensor([n.S + 1, 3])}, "lengths"),
        ("decode_attention", {"k_scale": rand(n.B, 2, n.S)}, "together"),
        ("decode_attention", {"k_scale": rand(n.B, 2, n.S), "v_scale": rand(n.B, 2, n.S)}, "int8"),
        ("decode_attention int8", {"v_scale": rand(n.B, 2, n.S + 1)}, "v_scale"),
        ("decode_attention int8", {"q": rand(n.B, 1, 4, n.D + 2)}, "head_dim"),
        ("decoder_layer", {"past": 3}, "cache"),
        ("decoder_layer", {"past": -1}, "cache"),
        ("decoder_layer", {"num_heads": 3}, "multiple"),
        ("decoder_layer", {"num_heads": 8}, "must have shape"),
        ("decoder_layer", {"x": rand(n.T, n.B, n.C).transpose(0, 1)}, "contiguous"),
        ("decoder_layer", {"mask": rand(n.B, 1, n.T, 3)}, "broadcast"),
        ("decoder_layer", {"weights": decoder_weights(n)._replace(o_bias=rand(n.C + 1))}, "o_bias"),
        ("decoder_layer", {"weights": tuple(decoder_weights(n))}, "give DecoderWeights"),
        ("linear_cross_entropy", {"labels": torch.full((n.N,), n.V)}, "labels"),
        ("linear_cross_entropy", {"labels": torch.full((n.N,), -1)}, "labels"),
        ("linear_cross_entropy", {"label_smoothing": 1.0}, "label_smoothing"),
        ("quantized_linear", {"weight": rand(n.F, n.K)}, "QuantizedWeight"),
        ("quantized_linear", {"x": rand(n.N, n.K - 1)}, "inputs"),
        ("vision_rope", {"q": rand(n.N, 4, 7), "k": rand(n.N, 4, 7)}, "even"),
        ("vision_block", {"num_heads": 3}, "num_heads"),
        ("vision_block", {"cu_seqlens": torch.tensor([0, n.N + 1], dtype=torch.int32)}, "cu_seqlens"),
        ("vision_block", {"cos": rand(n.N, n.C // 2).double()}, "cos must be a tensor of float32"),
        ("rms_norm", {"eps": float("nan")}, "eps must lie in"),
        ("layer_norm", {"eps": -1e-6}, "eps must lie in"),
        ("PreparedDecoderLayer.run", {"caches": []}, "every layer needs a cache"),
        ("PreparedDecoderLayer.run", {"layers": [], "caches": []}, "there must be one layer"),
    ],
)
def test_values_out_of_range(op, changes, match):
    _raises(op, match, **changes)


LAYERS = ("decoder_layer", "PreparedDecoderLayer.__call__", "QuantizedDecoderLayer.__call__")
CACHE = (n.B, n.HKV, n.S, n.D)


def _interleaved() -> tuple[torch.Tensor, torch.Tensor]:
    memory = rand(n.B, 2, n.HKV, n.S, n.D)
    return memory[:, 0], memory[:, 1]


def _halves() -> tuple[torch.Tensor, torch.Tensor]:
    memory = rand(n.B, n.HKV, n.S, 2 * n.D)
    return memory[..., : n.D], memory[..., n.D :]


def _overlapping() -> tuple[torch.Tensor, torch.Tensor]:
    memory = rand(n.B, n.HKV, n.S + 1, n.D)
    return memory[:, :, 1:], memory[:, :, :-1]


def _rows_overlap() -> torch.Tensor:
    return rand(n.B * n.HKV * n.S * n.D).as_strided(CACHE, (n.HKV * n.S * n.D // 2, n.S * n.D, n.D, 1))


@pytest.mark.parametrize("op", (*LAYERS, "PreparedCache"))
def test_memory_that_is_shared_is_refused(op):
    """A kernel's write to one of them would change the other, or its own input."""
    whole = rand(*CACHE)
    for k_cache, v_cache, match in (
        (whole, whole, "k_cache and v_cache share memory"),
        (whole, whole.view(CACHE), "k_cache and v_cache share memory"),
        (*_overlapping(), "k_cache and v_cache share memory"),
        (rand(1, *CACHE[1:]).expand(CACHE), rand(*CACHE), "elements of k_cache share memory"),
        (rand(*CACHE), rand(n.B, 1, n.S, n.D).expand(CACHE), "elements of v_cache share memory"),
        (rand(*CACHE), _rows_overlap(), "elements of v_cache share memory"),
        (whole, rand(*CACHE).requires_grad_(), "v_cache needs a gradient"),
    ):
        _raises(op, match, k_cache=k_cache, v_cache=v_cache)


@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.parametrize("name", ["x", "cos", "mask"])
def test_inputs_inside_a_cache_are_refused(op, name):
    shape, memory = CALLS[op][1](n)[name].shape, rand(500)
    size = torch.Size(CACHE).numel()
    _raises(
        op,
        f"{name} shares memory with a cache",
        **{name: memory[size - 1 :][: shape.numel()].view(shape), "k_cache": memory[:size].view(CACHE)},
    )


@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.parametrize("make", [_interleaved, _halves])
def test_caches_between_each_other_are_taken(op, make):
    call, arguments = CALLS[op][0], CALLS[op][1](n)
    k_cache, v_cache = make()
    apart = {"k_cache": k_cache.clone(), "v_cache": v_cache.clone()}
    with torch.no_grad():
        expected, out = call(**{**arguments, **apart}), call(**{**arguments, "k_cache": k_cache, "v_cache": v_cache})
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert torch.equal(k_cache, apart["k_cache"]) and torch.equal(v_cache, apart["v_cache"])


@pytest.mark.parametrize(
    ("kind", "weights"),
    [(qvl_kernels.PreparedDecoderLayer, decoder_weights), (qvl_kernels.QuantizedDecoderLayer, quantised_weights)],
)
def test_a_prepared_layer_refuses_gradients_of_its_weights(kind, weights):
    layer = kind(
        weights(n)._replace(k_norm=rand(n.D).requires_grad_()), num_heads=n.H, kv_heads=n.HKV, eps=1e-6, scale=0.3
    )
    call = {name: value for name, value in CALLS["PreparedDecoderLayer.__call__"][1](n).items() if name != "self"}
    with pytest.raises(RuntimeError, match="decoder_layer has no backward"):
        layer(**call)
    with torch.no_grad():
        assert not layer(**call).requires_grad


@pytest.mark.parametrize("kind", [qvl_kernels.PreparedDecoderLayer, qvl_kernels.QuantizedDecoderLayer])
def test_forced_reference_runs_the_reference(kind):
    weights = quantised_weights(n) if kind is qvl_kernels.QuantizedDecoderLayer else decoder_weights(n)
    wide = weights._replace(
        **{name: dequantize(w) for name, w in weights._asdict().items() if isinstance(w, QuantizedWeight)}
    )
    layer = kind(weights, num_heads=n.H, kv_heads=n.HKV, eps=1e-6, scale=0.3)
    call, make = CALLS["decoder_layer"]
    arguments = {name: value for name, value in make(n).items() if name not in ("weights", "num_heads", "eps", "scale")}
    with torch.no_grad():
        fast = layer(**_copied(arguments))
        with qvl_kernels.use_backend("reference"):
            out, expected = layer(**_copied(arguments)), call(**{**make(n), "weights": wide})
    assert torch.equal(out, expected) and not torch.equal(out, fast)


@pytest.mark.parametrize("op", ["attention", "decode_attention", "decoder_layer"])
def test_masks_may_have_any_strides(op):
    call, make = CALLS[op]
    with torch.no_grad():
        expected, out = call(**make(n)), call(**{**make(n), "mask": TENSORS["strided"](make(n)["mask"])})
    torch.testing.assert_close(out, expected)


def test_lengths_are_checked_where_tracing_hides_them():
    varlen = rand(n.N, n.H, n.D)
    compiled = torch.compile(qvl_kernels.attention, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 6"):
        compiled(varlen, varlen, varlen, cu_seqlens=torch.tensor([0, n.N + 100], dtype=torch.int32))
    compiled = torch.compile(qvl_kernels.cross_attention, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=r"key lengths must lie in \[0, 5\], got 99"):
        compiled(**{**CALLS["cross_attention"][1](n), "kv_lens": torch.tensor([99, 1])})


@pytest.mark.parametrize(
    "op",
    [name for name in CALLS if not name.startswith(("Prepared", "Quantized", "quant.", "use_")) and CALLS[name][1](n)],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_good_calls_are_one_graph(op, dynamic):
    """Argument checks neither break a graph nor refuse symbolic sizes."""
    torch._dynamo.reset()
    call, make = CALLS[op]
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)
    with torch.no_grad():
        for out, expected in zip(_results(compiled, make(n)), _results(call, make(n)), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_refused(layout):
    nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=layout)
    for call in (
        lambda: qvl_kernels.rms_norm(nested, torch.ones(8)),
        lambda: qvl_kernels.linear(nested, torch.ones(4, 8)),
        lambda: qvl_kernels.swiglu(nested, nested),
    ):
        with pytest.raises(ValueError, match="must be a dense tensor"):
            call()
