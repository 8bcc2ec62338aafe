"""The kernels at sizes that fill a GPU: a training batch of 4 x 2048 tokens, long prompts, images, and
decoding steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

import qvl_kernels
from bench.gpu import baselines as gpu_baselines
from bench.gpu.timing import compare, peak_bytes
from bench.variants import offered
from qvl_kernels.gpu.device import architecture
from qvl_kernels.quantization import QuantizedWeight
from qvl_kernels.testing import relative_error

__all__ = ["CASES", "KernelCase", "build", "copy_bandwidth", "run"]

CONSTANTS = ("cos", "sin")  # the cos/sin cache has no gradient
SEED = 0


@dataclass(frozen=True)
class KernelCase:
    """One op at one size. ``make(device, dtype)`` gives its keyword arguments, ``baselines`` functions that take the
    same.

    ``step``: backward and forward are timed together, since the forward may compute the gradients already.
    """

    name: str
    op: str
    make: Callable[[torch.device, torch.dtype], dict]
    baselines: Callable[[], dict[str, Callable]]
    bytes: float  # minimum memory traffic of the forward, 16-bit data
    flops: float = 0.0
    backward: bool = True
    memory: bool = False
    step: bool = False


def _normal(device: torch.device | str, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype) * scale


def _elementwise(name: str, op: str, shapes: dict[str, tuple[int, ...]], moved: float) -> KernelCase:
    return KernelCase(
        name,
        op,
        lambda device, dtype: {key: _normal(device, dtype, *shape) for key, shape in shapes.items()},
        lambda: gpu_baselines.plain_baselines(op),
        2.0 * moved,
    )


def _tables(device: torch.device | str, dtype: torch.dtype, *shape: int) -> dict[str, torch.Tensor]:
    angles = torch.rand(shape, device=device, dtype=torch.float32) * 50
    return {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}


def _qk_norm_rope(b: int, t: int, h: int, hkv: int, d: int) -> KernelCase:
    def make(device: torch.device | str, dtype: torch.dtype) -> dict:
        return {
            "q": _normal(device, dtype, b, t, h, d),
            "k": _normal(device, dtype, b, t, hkv, d),
            "q_weight": _normal(device, dtype, d),
            "k_weight": _normal(device, dtype, d),
            **_tables(device, dtype, b, t, d),
        }

    return KernelCase(
        "qk_norm_rope",
        "qk_norm_rope",
        make,
        lambda: gpu_baselines.plain_baselines("qk_norm_rope"),
        2.0 * b * t * d * (2 * (h + hkv) + 2),
    )


def _vision_rope(n: int, h: int, d: int) -> KernelCase:
    def make(device: torch.device | str, dtype: torch.dtype) -> dict:
        return {
            "q": _normal(device, dtype, n, h, d),
            "k": _normal(device, dtype, n, h, d),
            **_tables(device, torch.float32, n, d),
        }

    return KernelCase(
        "vision_rope",
        "vision_rope",
        make,
        lambda: gpu_baselines.plain_baselines("vision_rope"),
        n * d * (2.0 * 4 * h + 8),
    )


def _attention(
    name: str, b: int, t: int, h: int, hkv: int, d: int, *, causal: bool, varlen: bool = False
) -> KernelCase:
    def make(device: torch.device | str, dtype: torch.dtype) -> dict:
        lead = (b * t,) if varlen else (b, t)
        arguments = {
            "q": _normal(device, dtype, *lead, h, d),
            "k": _normal(device, dtype, *lead, hkv, d),
            "v": _normal(device, dtype, *lead, hkv, d),
            "causal": causal,
        }
        if varlen:
            arguments["cu_seqlens"] = torch.arange(0, b * t + 1, t, dtype=torch.int32, device=device)
        return arguments

    return KernelCase(
        name,
        "attention",
        make,
        lambda: gpu_baselines.attention_baselines(causal=causal, lengths=(b, t) if varlen else None),
        2.0 * b * t * d * (2 * h + 2 * hkv),
        4.0 * b * t * t * h * d * (0.5 if causal else 1.0),
    )


def _cross_attention(b: int, t: int, s: int, h: int, d: int) -> KernelCase:
    def make(device: torch.device | str, dtype: torch.dtype) -> dict:
        return {
            "q": _normal(device, dtype, b, t, h, d),
            "k": _normal(device, dtype, b, s, h, d),
            "v": _normal(device, dtype, b, s, h, d),
            "kv_lens": torch.full((b,), s, dtype=torch.int32, device=device)
            - 7 * torch.arange(b, dtype=torch.int32, device=device),
        }

    return KernelCase(
        "cross_attention",
        "cross_attention",
        make,
        gpu_baselines.cross_attention_baselines,
        4.0 * b * (t + s) * h * d,
        4.0 * b * t * s * h * d,
    )


def _decode_attention(name: str, b: int, s: int, h: int = 16, hkv: int = 8, d: int = 128) -> KernelCase:
    def make(device: torch.device | str, dtype: torch.dtype) -> dict:
        return {
            "q": _normal(device, dtype, b, 1, h, d),
            "k_cache": _normal(device, dtype, b, hkv, s, d),
            "v_cache": _normal(device, dtype, b, hkv, s, d),
            "lengths": torch.full((b,), s, dtype=torch.int32, device=device),
        }

    return KernelCase(
        name,
        "decode_attention",
        make,
        gpu_baselines.decode_attention_baselines,
        4.0 * b * s * hkv * d,
        4.0 * b * s * h * d,
        backward=False,
    )


def _linear(name: str, m: int, n: int, k: int, *, bits: int = 16) -> KernelCase:
    def make(device: torch.device | str, dtype: torch.dtype) -> dict:
        x = _normal(device, dtype, m, k)
        if bits == 16:
            return {"x": x, "weight": _normal(device, dtype, n, k, scale=k**-0.5)}
        if bits == 8:
            values = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
            scales = torch.full((n, 1), k**-0.5 / 64, dtype=torch.float32, device=device)
        else:
            values = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
            scales = torch.full((n, k // 64), k**-0.5 / 4, dtype=torch.bfloat16, device=device)
        return {"x": x, "weight": QuantizedWeight(values, scales, k)}

    op, baselines = (
        ("linear", lambda: gpu_baselines.plain_baselines("linear"))
        if bits == 16
        else ("quantized_linear", gpu_baselines.quantized_baselines)
    )
    return KernelCase(name, op, make, baselines, n * k * bits / 8 + 2.0 * m * (n + k), 2.0 * m * n * k, backward=False)


def _linear_cross_entropy(m: int, v: int, c: int) -> KernelCase:
    def make(device: torch.device | str, dtype: torch.dtype) -> dict:
        return {
            "hidden": _normal(device, dtype, m, c),
            "weight": _normal(device, dtype, v, c, scale=c**-0.5),
            "labels": torch.randint(0, v, (m,), device=device),
        }

    return KernelCase(
        "linear_cross_entropy",
        "linear_cross_entropy",
        make,
        gpu_baselines.linear_cross_entropy_baselines,
        2.0 * (m + v) * c,
        2.0 * m * v * c,
        memory=True,
        step=True,
    )


def _patch_embed(n: int, e: int) -> KernelCase:
    kernel = (3, 2, 16, 16)

    def make(device: torch.device | str, dtype: torch.dtype) -> dict:
        return {
            "pixels": _normal(device, dtype, n, 1536),
            "weight": _normal(device, dtype, e, *kernel, scale=1536**-0.5),
            "bias": _normal(device, dtype, e),
        }

    def convolution(pixels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv3d(pixels.view(-1, *kernel), weight, bias, stride=kernel[1:]).flatten(1)

    return KernelCase(
        "patch_embed",
        "patch_embed",
        make,
        lambda: {"conv3d": convolution},
        2.0 * (n * 1536 + e * 1536 + n * e),
        2.0 * n * e * 1536,
        backward=False,
    )


T, C, F = 8192, 2048, 6144  # tokens of a training batch, hidden size, MLP width
P, E = 16384, 1024  # patches of 16 images of 512 x 512, vision hidden size
CASES = [
    _elementwise("rms_norm", "rms_norm", {"x": (T, C), "weight": (C,)}, 2 * T * C),
    _elementwise("add_rms_norm", "add_rms_norm", {"x": (T, C), "residual": (T, C), "weight": (C,)}, 4 * T * C),
    _elementwise("layer_norm", "layer_norm", {"x": (P, E), "weight": (E,), "bias": (E,)}, 2 * P * E),
    _elementwise(
        "add_layer_norm", "add_layer_norm", {"x": (P, E), "residual": (P, E), "weight": (E,), "bias": (E,)}, 4 * P * E
    ),
    _qk_norm_rope(4, 2048, 16, 8, 128),
    _vision_rope(P, 16, 64),
    _elementwise("swiglu", "swiglu", {"gate": (T, F), "up": (T, F)}, 3 * T * F),
    _elementwise("gelu_tanh", "gelu_tanh", {"x": (P, 4 * E), "bias": (4 * E,)}, 2 * P * 4 * E),
    _attention("attention train", 4, 2048, 16, 8, 128, causal=True),
    _attention("attention 16k", 1, 16384, 16, 8, 128, causal=True),
    _attention("attention full", 1, 16384, 16, 16, 128, causal=False),
    _attention("attention vision", 16, 1024, 16, 16, 64, causal=False, varlen=True),
    _cross_attention(8, 512, 1024, 32, 64),
    _decode_attention("decode_attention 1 x 2k", 1, 2048),
    _decode_attention("decode_attention 1 x 32k", 1, 32768),
    _decode_attention("decode_attention 32 x 2k", 32, 2048),
    _linear_cross_entropy(T, 151936, C),
    _linear("linear 1 row", 1, F, C),
    _linear("linear head", 1, 151936, C),
    _linear("linear 16 rows", 16, F, C),
    _linear("int8 linear 1 row", 1, F, C, bits=8),
    _linear("int8 linear prefill", 2048, F, C, bits=8),
    _linear("int4 linear 1 row", 1, F, C, bits=4),
    _linear("int4 linear prefill", 2048, F, C, bits=4),
    _patch_embed(P, E),
]


def _outputs(result: Any) -> list[torch.Tensor]:
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x.is_floating_point()]


def _fp32(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _own(arguments: dict, backward: bool) -> dict:
    """A copy of the arguments for one baseline: some libraries write gradients over their inputs."""

    def copy(name: str, x: Any) -> Any:
        return tree_map(
            lambda t: (
                t.clone().requires_grad_(backward and t.is_floating_point() and name not in CONSTANTS)
                if isinstance(t, torch.Tensor)
                else t
            ),
            x,
        )

    return {name: copy(name, value) for name, value in arguments.items()}


def _gradient(function: Callable, arguments: dict) -> Callable[[], object]:
    """The backward pass alone, repeated over one forward pass."""
    inputs = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    out = [x for x in _outputs(function(**arguments)) if x.requires_grad]
    cotangents = [torch.randn_like(x) for x in out]
    return lambda: torch.autograd.grad(out, inputs, cotangents, retain_graph=True)


def _step(function: Callable, arguments: dict) -> Callable[[], object]:
    """Forward and backward, as in training: each graph is used once."""
    inputs = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        out = [x for x in _outputs(function(**arguments)) if x.requires_grad]
        return torch.autograd.grad(out, inputs, [torch.ones_like(x) for x in out])

    return step


def run(case: KernelCase, device: torch.device, dtype: torch.dtype = torch.bfloat16, seconds: float = 0.4) -> dict:
    """Errors against fp32, then milliseconds of forward and backward of ours and of each baseline, then memory if the
    case asks for it; the forward also with other kernel features than the default, and a copy of as many bytes where
    memory bandwidth is the bound.

    Returns {"errors", "forward", "backward", "memory": by baseline, "variants": ours with other features,
    "unavailable": {baseline: reason}, "bytes", "flops"}.
    """
    torch.manual_seed(SEED)
    made = case.make(device, dtype)
    ours, baselines = getattr(qvl_kernels, case.op), case.baselines()
    variants = offered(case.op, ours, architecture(device))  # of the forward pass
    contestants = {"ours": ours, **baselines, **variants}
    golden_of = next(iter(baselines.values()))
    errors, unavailable, arguments = {}, {}, {}
    with torch.no_grad():
        golden = _outputs(golden_of(**{name: _fp32(x) for name, x in made.items()}))
        for name, function in list(contestants.items()):
            try:
                errors[name] = max(relative_error(x, exact) for x, exact in zip(_outputs(function(**made)), golden))
                arguments[name] = _own(made, case.backward and name not in variants)
            except Exception as error:  # a baseline may be missing here; if ours fails, theirs stay
                unavailable[name] = f"{type(error).__name__}: {error}"[:200]
                del contestants[name]
        del golden
        if not contestants:
            raise RuntimeError(f"nothing runs: {unavailable}")
        timed = {name: lambda f=function, a=arguments[name]: f(**a) for name, function in contestants.items()}
        if not case.flops:  # memory-bound: compared with a copy of as many bytes
            timed["copy"] = _copy(int(case.bytes) // 2, device)
        forward = compare(timed, device, seconds=seconds)
    result = {
        "errors": errors,
        "forward": forward,
        "variants": [*variants],
        "unavailable": unavailable,
        "bytes": case.bytes,
        "flops": case.flops,
    }
    for name in variants:
        contestants.pop(name, None)
    if case.backward:
        measured = _step if case.step else _gradient
        result["backward"] = compare(
            {name: measured(function, arguments[name]) for name, function in contestants.items()},
            device,
            seconds=seconds,
        )
    if case.memory:
        result["memory"] = {
            name: peak_bytes(_step(function, arguments[name]), device) for name, function in contestants.items()
        }
    return result


def build(case: KernelCase, arch: str = "sm_90") -> dict:
    """Without a GPU: the baselines are made, the arguments are fake CUDA tensors, and every kernel launched on them is
    compiled.
    """
    from bench.compile_check.compiled import inspect, violations
    from bench.compile_check.launches import record_call, specialise

    ours = getattr(qvl_kernels, case.op)
    case.baselines()
    calls = [
        call
        for function in (ours, *offered(case.op, ours, arch).values())
        for side in record_call(function, lambda: case.make(torch.device("cuda"), torch.bfloat16), arch)
        for call in side
    ]
    made = {s.key: s for call in calls for launch in call.launches for s in [specialise(launch, arch)]}
    wrong = [f"{s.kernel.__name__}: {text}" for s in made.values() for _, text in violations(arch, inspect(s))]
    return {"kernels": sorted({s.kernel.__name__ for s in made.values()}), "violations": wrong}


def _copy(bytes: int, device: torch.device) -> Callable[[], object]:
    source = torch.randint(0, 256, (bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth(device: torch.device, bytes: int = 2 << 30) -> dict:
    """GB/s of a large device copy, reading and writing counted."""
    times = compare({"copy": _copy(bytes, device)}, device)["copy"]
    return {"gb_s": 2 * bytes / times["median"] / 1e6, "milliseconds": times}
