import torch

from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES"]


def _case(name: str, b: int, t: int, s: int, h: int, hkv: int, d: int, lengths, *, masked=False, model=False) -> Case:
    def make(dtype, generator):
        arguments = {
            "q": random_tensor((b, t, h, d), dtype, generator),
            "k_cache": random_tensor((b, hkv, s, d), dtype, generator),
            "v_cache": random_tensor((b, hkv, s, d), dtype, generator),
            "lengths": lengths if isinstance(lengths, int) else torch.tensor(lengths),
        }
        if masked:
            arguments["mask"] = torch.rand(b, 1, t, s, generator=generator) > 0.5
        return arguments

    keys = b * lengths if isinstance(lengths, int) else sum(lengths)
    return Case(
        name, make, flops=4.0 * t * keys * h * d,
        bytes=lambda size: float(2 * b * t * h * d + 2 * keys * hkv * d) * size, model=model,
    )  # fmt: skip


CASES = [
    _case("short_cache", 1, 1, 300, 16, 8, 128, 300, model=True),
    _case("long_cache", 1, 1, 32768, 16, 8, 128, 32768, model=True),
    _case("lengths", 3, 1, 60, 4, 2, 16, [60, 1, 17]),
    _case("four_queries", 2, 4, 50, 6, 3, 24, [50, 4]),
    _case("masked", 2, 2, 40, 4, 2, 16, 40, masked=True),
]
