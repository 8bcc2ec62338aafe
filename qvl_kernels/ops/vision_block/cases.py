"""Cases of vision_block: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.ops.vision_block.api import VisionWeights
from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES"]


def _case(name: str, lengths: list[int], c: int, h: int, f: int, *, model: bool = False) -> Case:
    tokens = sum(lengths)

    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        def w(n: int, k: int) -> torch.Tensor:
            return random_tensor((n, k), dtype, generator, scale=k**-0.5)

        def b(n: int) -> torch.Tensor:
            return 0.1 * random_tensor((n,), dtype, generator)

        weights = VisionWeights(
            1.0 + b(c), b(c), w(3 * c, c), b(3 * c), w(c, c), b(c), 1.0 + b(c), b(c), w(f, c), b(f), w(c, f), b(c)
        )
        angles = torch.rand(tokens, c // h // 2, generator=generator) * 50
        angles = torch.cat((angles, angles), -1)
        return {
            "x": random_tensor((tokens, c), dtype, generator),
            "weights": weights,
            "cos": angles.cos(),
            "sin": angles.sin(),
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
            "num_heads": h,
        }

    parameters = 4 * c * c + 2 * c * f
    return Case(
        name,
        make,
        flops=2.0 * tokens * parameters + 4.0 * c * sum(length**2 for length in lengths),
        bytes=lambda size: float(parameters + 2 * tokens * c) * size,
        model=model,
    )


CASES = [
    _case("image_448", [784], 1024, 16, 4096, model=True),
    _case("odd", [4, 68, 12], 60, 3, 70),
    _case("one_patch", [1], 32, 2, 64),
    _case("panels", [130, 6], 64, 4, 130),
    _case("whole_tiles", [3, 40, 5], 64, 4, 96),
    _case("wide_heads", [30, 40], 64, 2, 96),
]
