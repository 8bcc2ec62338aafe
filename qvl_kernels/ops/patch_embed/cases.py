"""Cases of patch_embed: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES"]


def _case(
    name: str, n: int, e: int, kernel: tuple[int, int, int, int], *, bias: bool = True, model: bool = False
) -> Case:
    c, t, h, w = kernel
    k = c * t * h * w

    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        return {
            "pixels": random_tensor((n, k), dtype, generator),
            "weight": random_tensor((e, *kernel), dtype, generator, scale=k**-0.5),
            "bias": random_tensor((e,), dtype, generator) if bias else None,
        }

    return Case(name, make, flops=2.0 * n * e * k, bytes=lambda size: float(n * k + e * k + n * e) * size, model=model)


CASES = [
    _case("image_448", 784, 1024, (3, 2, 16, 16), model=True),
    _case("odd", 5, 33, (3, 1, 5, 3)),
    _case("whole_tiles", 18, 33, (3, 2, 4, 4)),
    _case("no_bias", 9, 16, (1, 2, 4, 4), bias=False),
]
