"""Cases of linear_cross_entropy: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES"]


def _case(
    name: str,
    m: int,
    v: int,
    c: int,
    *,
    ignored: int = 0,
    smoothing: float = 0.0,
    reduction: str = "mean",
    model: bool = False,
) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        labels = torch.randint(0, v, (m,), generator=generator)
        labels[:ignored] = -100
        return {
            "hidden": random_tensor((m, c), dtype, generator),
            "weight": random_tensor((v, c), dtype, generator, scale=c**-0.5),
            "labels": labels,
            "label_smoothing": smoothing,
            "reduction": reduction,
        }

    return Case(name, make, flops=2.0 * m * v * c, bytes=lambda size: float(m * c + v * c) * size, model=model)


CASES = [
    _case("tokens_256", 256, 151936, 2048, model=True),
    _case("mean", 37, 131, 24, ignored=5),
    _case("sum_smoothed", 19, 64, 33, smoothing=0.1, reduction="sum"),
    _case("whole_tiles", 21, 50, 64),
    _case("none", 7, 50, 16, ignored=2, reduction="none"),
]
