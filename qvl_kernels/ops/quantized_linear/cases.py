"""Cases of quantized_linear: shapes of the model and awkward ones, for tests and benchmarks."""

from typing import Any

import torch

from qvl_kernels.quantization import quantize
from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES"]


def _exact_in_int8(m: int, k: int, skipped: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rows [m, k], of stride k + skipped, that int8 represents exactly with the scale max |x| / 127 of a row, or of
    groups of 32 or more: so tests measure the kernel's error, not the format's.
    """
    x = torch.randint(-127, 128, (m, skipped + k), generator=generator)
    x[:, skipped::32] = 127
    return (x / 64.0).to(dtype)[:, skipped:]


def _case(
    name: str,
    bits: int,
    m: int,
    n: int,
    k: int,
    *,
    group: int = 64,
    bias: bool = False,
    strided: bool = False,
    model: bool = False,
    **options: Any,
) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        x = _exact_in_int8(m, k, 5 if strided else 0, dtype, generator)
        weight = quantize(random_tensor((n, k), torch.float32, generator, scale=k**-0.5), bits, group, **options)
        if strided:
            weight = weight.apply(lambda x: torch.nn.functional.pad(x, (3, 0))[:, 3:])
        return {"x": x, "weight": weight, "bias": random_tensor((n,), dtype, generator) if bias else None}

    padded = -(-k // group) * group
    weight_bytes = (
        n * (k + 4) if bits == 8 else n * (padded / 2 + padded / group * (2.5 if options.get("zero_points") else 2))
    )
    return Case(
        name, make, flops=2.0 * m * n * k, bytes=lambda size: float(m * k + m * n) * size + weight_bytes, model=model
    )


CASES = [
    _case("int8_decode_mlp", 8, 1, 6144, 2048, model=True),
    _case("int4_decode_mlp", 4, 1, 6144, 2048, model=True),
    _case("int8_prefill_mlp", 8, 262, 6144, 2048, model=True),
    _case("int4_prefill_mlp", 4, 262, 6144, 2048, model=True),
    _case("int4_zeros_decode_mlp", 4, 1, 6144, 2048, group=32, zero_points=True, model=True),
    _case("int4_zeros_prefill_mlp", 4, 262, 6144, 2048, group=32, zero_points=True, model=True),
    _case("int8_vision_down", 8, 784, 1024, 4096, bias=True, model=True),
    _case("int8_one", 8, 1, 1, 1),
    _case("int4_one", 4, 1, 1, 1, group=32),
    _case("int8_odd_rows_3", 8, 3, 37, 75, bias=True),
    _case("int4_odd_rows_5", 4, 5, 29, 75, group=32, bias=True),
    _case("int4_group_128", 4, 2, 18, 300, group=128),
    _case("int8_odd_rows_33", 8, 33, 50, 129, bias=True),
    _case("int4_odd_rows_33", 4, 33, 45, 131, group=64, bias=True),
    _case("int8_strided", 8, 19, 21, 48, strided=True),
    _case("int4_strided_decode", 4, 3, 19, 96, group=32, strided=True, bias=True),
    _case("int4_zeros_odd_rows_5", 4, 5, 29, 75, group=32, bias=True, zero_points=True),
    _case("int4_zeros_odd_rows_33", 4, 33, 45, 131, bias=True, zero_points=True, scale_dtype=torch.float16),
    _case("int4_zeros_strided_decode", 4, 1, 19, 300, group=128, strided=True, zero_points=True),
    _case("int8_whole_tiles", 8, 35, 43, 96, bias=True),
    _case("int4_whole_tiles", 4, 35, 43, 192, bias=True),
    _case("int4_zeros_whole_tiles", 4, 35, 43, 192, group=32, bias=True, zero_points=True),
    _case("int8_no_rows", 8, 0, 8, 16),
    _case("int4_no_rows", 4, 0, 8, 64),
]
