"""Cases of the GEMV ops, for tests and for the compile check at the shapes of Qwen3-VL-2B (``model``)."""

from collections.abc import Callable
from typing import Any

import torch

from qvl_kernels.ops.gemv.op import gemv_op, gemv_swiglu_op, quantized_gemv_op, quantized_gemv_swiglu_op
from qvl_kernels.quantization import quantize
from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES", "op_of"]

EPS = 1e-6


def op_of(arguments: dict) -> Callable:
    """The op whose schema has these arguments."""
    quantized, pair = (
        "values" in arguments or "gate_values" in arguments,
        "gate" in arguments or "gate_values" in arguments,
    )
    return {(False, False): gemv_op, (False, True): gemv_swiglu_op, (True, False): quantized_gemv_op}.get(
        (quantized, pair), quantized_gemv_swiglu_op
    )


def _case(
    name: str,
    m: int,
    n: int,
    k: int,
    *,
    bits: int = 0,
    group: int = 64,
    swiglu: bool = False,
    norm: bool = True,
    plus: bool = True,
    strided: int = 0,
    scale: float = 1.0,
    model: bool = False,
    **options: Any,
) -> Case:
    """``plus``: bias and residual where the op has them; ``strided``: elements between rows and before the first."""

    def spread(x: torch.Tensor) -> torch.Tensor:
        if not strided:
            return x
        wider = torch.zeros(x.shape[0], x.shape[1] + strided, dtype=x.dtype)
        wider[:, strided:] = x
        return wider[:, strided:]

    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        def weight(prefix: str) -> dict:
            w = random_tensor((n, k), torch.float32 if bits else dtype, generator, scale=max(1, k) ** -0.5)
            if not bits:
                return {prefix or "weight": spread(w)}
            values, scales, _, zeros = quantize(w, bits, group, **options)
            tensors = {"values": spread(values), "scales": scales, "zeros": zeros if zeros is None else spread(zeros)}
            return {f"{prefix}_{name}".strip("_"): tensor for name, tensor in tensors.items()}

        arguments: dict[str, Any] = {"x": spread(random_tensor((m, k), dtype, generator, scale=scale))}
        arguments |= weight("gate") | weight("up") if swiglu else weight("")
        if not swiglu:
            arguments["bias"] = random_tensor((n,), dtype, generator) if plus else None
        arguments |= {"norm_weight": random_tensor((k,), dtype, generator) if norm else None, "eps": EPS}
        if not swiglu:
            arguments["residual"] = spread(random_tensor((m, n), dtype, generator)) if plus else None
        return arguments

    per_row = {
        0: lambda size: k * size,
        8: lambda size: k + 4,
        4: lambda size: k // 2 + (2.5 if "zero_points" in options else 2) * (k // group),
    }[bits]
    weights = 2 * n if swiglu else n
    return Case(
        name,
        make,
        flops=2.0 * m * weights * k,
        bytes=lambda size: float(
            weights * per_row(size) + (m * k + k * norm + m * n + (m * n + n) * (plus and not swiglu)) * size
        ),
        model=model,
    )


def _model_cases() -> list[Case]:
    cases = []
    for bits in (0, 8, 4):
        for rows in (1, 4, 16):
            label = f"{bits or 'dense'}_rows_{rows}"
            cases += [
                _case(f"q_{label}", rows, 2048, 2048, bits=bits, plus=False, model=True),
                _case(f"kv_{label}", rows, 1024, 2048, bits=bits, plus=False, model=True),
                _case(f"down_{label}", rows, 2048, 6144, bits=bits, norm=False, model=True),
                _case(f"mlp_{label}", rows, 6144, 2048, bits=bits, swiglu=True, model=True),
            ]
        if bits == 4:
            zeros: dict[str, Any] = {"bits": 4, "group": 32, "zero_points": True, "model": True}
            cases += [
                _case("down_zeros_rows_1", 1, 2048, 6144, norm=False, **zeros),
                _case("mlp_zeros_rows_1", 1, 6144, 2048, swiglu=True, **zeros),
                _case("mlp_zeros_rows_16", 16, 6144, 2048, swiglu=True, **zeros),
            ]
        cases.append(_case(f"head_{bits or 'dense'}", 1, 151936, 2048, bits=bits, plus=False, model=True))
    return cases


CASES = [
    _case("one", 1, 1, 1),
    _case("odd", 1, 19, 75),
    _case("rows_3", 3, 9, 130),
    _case("rows_4_plain", 4, 6, 64, norm=False, plus=False),
    _case("rows_7", 7, 20, 100),
    _case("rows_16_strided", 16, 5, 37, strided=3),
    _case("swiglu", 1, 10, 64, swiglu=True),
    _case("swiglu_rows_5", 5, 17, 75, swiglu=True, strided=1),
    _case("no_rows", 0, 4, 8),
    _case("no_inputs", 2, 4, 0, norm=False),
    _case("large_rows_6", 6, 7, 96, scale=15000.0, plus=False),  # times the norm's weight beyond fp16
    _case("int8_one", 1, 1, 1, bits=8),
    _case("int8_rows_2", 2, 21, 300, bits=8),
    _case("int8_rows_9_strided", 9, 18, 65, bits=8, strided=5),
    _case("int8_swiglu", 1, 9, 80, bits=8, swiglu=True, norm=False),
    _case("int8_swiglu_rows_5", 5, 6, 40, bits=8, swiglu=True),
    _case("int4_one", 1, 1, 1, bits=4, group=32),
    _case("int4_words", 1, 19, 300, bits=4),
    _case("int4_words_group_128", 1, 5, 256, bits=4, group=128, plus=False),
    _case("int4_words_swiglu", 1, 9, 100, bits=4, group=32, swiglu=True),
    _case("int4_odd_k", 1, 7, 99, bits=4, group=32),
    _case("int4_misaligned", 1, 7, 64, bits=4, group=32, strided=3),
    _case("int4_rows_2", 2, 18, 130, bits=4, group=32),
    _case("int4_swiglu_rows_11", 11, 8, 96, bits=4, group=32, swiglu=True, norm=False),
    _case("int4_zeros_words", 1, 19, 300, bits=4, group=32, zero_points=True),
    _case("int4_zeros_words_group_64", 1, 6, 320, bits=4, zero_points=True, scale_dtype=torch.float16),
    _case("int4_zeros_words_swiglu", 1, 9, 300, bits=4, group=128, swiglu=True, zero_points=True),
    _case("int4_zeros_rows_5_strided", 5, 18, 130, bits=4, group=32, strided=3, zero_points=True),
    _case("int4_zeros_swiglu_rows_11", 11, 8, 200, bits=4, swiglu=True, zero_points=True, scale_dtype=torch.float16),
    _case("int4_fp16_scales", 1, 7, 128, bits=4, group=32, scale_dtype=torch.float16),
    *_model_cases(),
]
