"""Cases of decode_attention: shapes of the model and awkward ones, for tests and benchmarks."""

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
    lengths: int | list[int],
    *,
    masked: bool = False,
    int8: bool = False,
    model: bool = False,
) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        arguments = {
            "q": random_tensor((b, t, h, d), dtype, generator),
            "k_cache": random_tensor((b, hkv, s, d), dtype, generator),
            "v_cache": random_tensor((b, hkv, s, d), dtype, generator),
            "lengths": lengths if isinstance(lengths, int) else torch.tensor(lengths),
        }
        if int8:
            for name in ("k", "v"):
                arguments[f"{name}_cache"] = torch.randint(
                    -127, 128, (b, hkv, s, d), generator=generator, dtype=torch.int8
                )
                arguments[f"{name}_scale"] = torch.rand(b, hkv, s, generator=generator) / 64.0
        if masked:
            arguments["mask"] = torch.rand(b, 1, t, s, generator=generator) > 0.5
        return arguments

    keys = b * lengths if isinstance(lengths, int) else sum(lengths)
    return Case(
        name,
        make,
        flops=4.0 * t * keys * h * d,
        bytes=lambda size: 2.0 * b * t * h * d * size + 2.0 * keys * hkv * (d + 4 if int8 else d * size),
        model=model,
    )


CASES = [
    _case("short_cache", 1, 1, 300, 16, 8, 128, 300, model=True),
    _case("long_cache", 1, 1, 32768, 16, 8, 128, 32768, model=True),
    _case("int8_cache", 1, 1, 4096, 16, 8, 128, 4096, int8=True, model=True),
    _case("lengths", 3, 1, 60, 4, 2, 16, [60, 1, 17]),
    _case("four_queries", 2, 4, 50, 6, 3, 24, [50, 4]),
    _case("masked", 2, 2, 40, 4, 2, 16, 40, masked=True),
    _case("int8_lengths", 2, 3, 70, 4, 2, 16, [3, 70], int8=True),
    _case("int8_masked", 2, 1, 33, 4, 1, 80, [33, 9], int8=True, masked=True),
]
