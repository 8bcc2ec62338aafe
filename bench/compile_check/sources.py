"""Inputs of the compile check: every public op over its shared cases and the sizes of the GPU benchmark, the decode
step, and every kernel feature.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

import qvl_kernels
from bench.gpu import kernels as gpu_kernels
from bench.kernels import cases_of, ops
from bench.variants import COMBINATIONS, plain, using
from qvl_kernels.ops.decoder_layer import DecoderWeights
from qvl_kernels.ops.decoder_layer.decode_step import decode_step
from qvl_kernels.ops.decoder_layer.growing_caches import GrowingCaches
from qvl_kernels.ops.gemv import cases as gemv
from qvl_kernels.quantization import QuantizedWeight
from qvl_kernels.testing import Case, random_tensor

__all__ = ["Source", "sources"]


@dataclass(frozen=True)
class Source:
    """A function of keyword arguments and its cases; of a kernel with ``variants`` only the launches that use one of
    them count.
    """

    function: Callable
    cases: list[Case]
    variants: tuple[str, ...] = ()


C, H, HKV, D, F = 2048, 16, 8, 128, 6144  # of a decoder layer
KEYS = 1024  # KV length of each row, for FLOPs and bytes; kernels do not depend on it


def _weight(n: int, k: int, bits: int, dtype: torch.dtype) -> torch.Tensor | QuantizedWeight:
    if bits == 16:
        return torch.empty(n, k, dtype=dtype)
    if bits == 8:
        return QuantizedWeight(torch.empty(n, k, dtype=torch.int8), torch.empty(n, 1), k)
    return QuantizedWeight(torch.empty(n, k // 2, dtype=torch.uint8), torch.empty(n, k // 64, dtype=torch.bfloat16), k)


def _decode_step_case(rows: int, bits: int) -> Case:
    """One token of ``rows`` rows through a layer, as a CUDA graph of decoding holds it."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        def tensor(*shape: int) -> torch.Tensor:
            return random_tensor(shape, dtype, generator)

        q, kv = _weight(H * D, C, bits, dtype), _weight(HKV * D, C, bits, dtype)
        up, o, down = _weight(F, C, bits, dtype), _weight(C, H * D, bits, dtype), _weight(C, F, bits, dtype)
        weights = DecoderWeights(tensor(C), q, kv, kv, tensor(D), tensor(D), o, tensor(C), up, up, down)
        return {
            "x": tensor(rows, 1, C),
            "weights": weights,
            "cos": tensor(rows, 1, D),
            "sin": tensor(rows, 1, D),
            "lengths": torch.zeros(rows, dtype=torch.int32),
            "cache_seqlens": torch.ones(rows, dtype=torch.int32),
        }

    parameters = C * (H + 2 * HKV) * D + H * D * C + 3 * C * F
    return Case(
        f"{rows}_rows_{bits}_bits",
        make,
        flops=2.0 * rows * parameters + 4.0 * rows * KEYS * H * D,
        bytes=lambda size: parameters * bits / 8 + 2.0 * rows * HKV * KEYS * D * size,
        model=True,
    )


def _decode_step(*, x: torch.Tensor, weights: Any, **arguments: Any) -> Any:
    layer = SimpleNamespace(weights=weights, num_heads=H, kv_heads=HKV, head_dim=D, eps=1e-6, scale=D**-0.5)
    caches = GrowingCaches(1, x.shape[0], HKV, D, x.dtype, x.device)  # empty: kernels take its table only
    return decode_step(x, layer, caches=caches, index=0, **arguments)


def _benchmarked(op: str) -> list[Case]:
    """The cases of the GPU benchmark in the form of shared ones."""

    def shared(case: gpu_kernels.KernelCase) -> Case:
        return Case(
            case.name,
            lambda dtype, generator: case.make(torch.device("cpu"), dtype),
            case.flops,
            lambda size: case.bytes,
            model=True,
        )

    return [shared(case) for case in gpu_kernels.CASES if case.op == op]


def _with_dropout() -> tuple[Case, Case]:
    """Attention and cross-attention of QVL in training. No shared cases: dropout keep masks differ between backends."""
    b, t, s, h, hkv, d = 4, 2048, 256, 32, 8, 64

    def made(keys: int, heads: int, **others: Any) -> Callable[[torch.dtype, torch.Generator], dict]:
        return lambda dtype, generator: {
            "q": random_tensor((b, t, h, d), dtype, generator),
            "k": random_tensor((b, keys, heads, d), dtype, generator),
            "v": random_tensor((b, keys, heads, d), dtype, generator),
            "dropout_p": 0.1,
            **others,
        }

    lens = torch.tensor([s, s, 100, 0], dtype=torch.int32)
    return (
        Case(
            "dropout",
            made(t, hkv, causal=True),
            flops=2.0 * b * t * t * h * d,
            bytes=lambda size: 2.0 * b * t * (h + hkv) * d * size,
            model=True,
        ),
        Case(
            "dropout",
            made(s, h, kv_lens=lens),
            flops=4.0 * b * t * s * h * d,
            bytes=lambda size: 2.0 * b * (t + s) * h * d * size,
            model=True,
        ),
    )


def sources() -> dict[str, Source]:
    """What to audit by name."""
    found = {op: Source(getattr(qvl_kernels, op), [*cases_of(op), *_benchmarked(op)]) for op in ops()}
    for op, case in zip(("attention", "cross_attention"), _with_dropout()):
        found[op].cases.append(case)
    found["gemv"] = Source(lambda **arguments: gemv.op_of(arguments)(**arguments), gemv.CASES)
    found["decode_step"] = Source(
        _decode_step, [_decode_step_case(rows, bits) for rows in (1, 4, 16, 32) for bits in (16, 8, 4)]
    )
    varied = {
        "+".join((op, *names)): Source(
            using(found[op].function, kernel, names), [case for case in found[op].cases if case.model], names
        )
        for op, kernel, names in COMBINATIONS
    }
    return {name: replace(source, function=plain(source.function)) for name, source in found.items()} | varied
