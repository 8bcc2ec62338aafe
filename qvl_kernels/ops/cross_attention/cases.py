"""Cases of cross_attention: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES"]


def _case(
    name: str,
    b: int,
    t: int,
    s: int,
    h: int,
    hkv: int,
    d: int,
    *,
    lens: list[int] | None = None,
    padding: bool = False,
    model: bool = False,
) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        arguments = {
            "q": random_tensor((b, t, h, d), dtype, generator),
            "k": random_tensor((b, s, hkv, d), dtype, generator),
            "v": random_tensor((b, s, hkv, d), dtype, generator),
        }
        if lens is not None:
            arguments["kv_lens"] = torch.tensor(lens)
        if padding:
            arguments["key_padding_mask"] = torch.rand(b, s, generator=generator) > 0.4
        return arguments

    return Case(
        name,
        make,
        flops=4.0 * b * t * s * h * d,
        bytes=lambda size: float(2 * b * t * h * d + 2 * b * s * hkv * d) * size,
        model=model,
    )


CASES = [
    _case("image_448", 1, 66, 196, 32, 32, 64, model=True),
    _case("lengths", 3, 10, 37, 4, 2, 16, lens=[37, 0, 5]),
    _case("lengths_and_padding", 2, 9, 140, 4, 4, 24, lens=[140, 70], padding=True),
    _case("whole_tiles", 2, 9, 70, 4, 2, 32),
    _case("one_query", 2, 1, 50, 2, 1, 20, lens=[50, 3]),
]
