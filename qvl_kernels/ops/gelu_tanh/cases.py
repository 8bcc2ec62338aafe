"""Cases of gelu_tanh: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES"]


def _case(name: str, shape: tuple[int, ...], *, scale: float = 1.0, bias: bool = False, model: bool = False) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        return {
            "x": random_tensor(shape, dtype, generator, scale=scale),
            "bias": random_tensor(shape[-1:], dtype, generator) if bias else None,
        }

    elements = 1
    for size in shape:
        elements *= size
    return Case(name, make, flops=12.0 * elements, bytes=lambda size: 2.0 * elements * size, model=model)


CASES = [
    _case("vision_mlp", (784, 4096), bias=True, model=True),
    _case("odd", (3, 5, 37)),
    _case("odd_bias", (6, 35), bias=True),
    _case("extreme", (4, 64), scale=30.0),
    _case("empty", (0, 8)),
]
