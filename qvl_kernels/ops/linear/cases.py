"""Cases of linear: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES"]


def _case(name: str, m: int, n: int, k: int, *, bias: bool = False, model: bool = False, strided: bool = False) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        x = random_tensor((m, k + 5 if strided else k), dtype, generator)
        weight = random_tensor((n, k + 3 if strided else k), dtype, generator, scale=k**-0.5 if k else 1.0)
        if strided:
            x, weight = x[:, 5:], weight[:, 3:]
        return {"x": x, "weight": weight, "bias": random_tensor((n,), dtype, generator) if bias else None}

    return Case(name, make, flops=2.0 * m * n * k, bytes=lambda size: float(m * k + n * k + m * n) * size, model=model)


CASES = [
    _case("decode_mlp", 1, 6144, 2048, model=True),
    _case("decode_head", 1, 151936, 2048, model=True),
    _case("prefill_mlp", 262, 6144, 2048, model=True),
    _case("prefill_down", 262, 2048, 6144, model=True),
    _case("vision_qkv", 784, 3072, 1024, bias=True, model=True),
    _case("one", 1, 1, 1),
    _case("odd_k_rows_2", 2, 9, 33, bias=True),
    _case("rows_4", 4, 131, 70),
    _case("rows_5", 5, 97, 64, bias=True),
    _case("odd_k_rows_17", 17, 50, 129),
    _case("two_panels", 70, 100, 2050, bias=True),
    _case("many_panels", 600, 98, 66),
    _case("strided", 19, 40, 48, strided=True),
    _case("strided_decode", 3, 40, 45, strided=True, bias=True),
    _case("whole_tiles", 40, 50, 96, strided=True, bias=True),
    _case("no_rows", 0, 8, 16),
]
