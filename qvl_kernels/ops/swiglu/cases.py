"""Cases of swiglu: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES"]


def _case(name: str, shape: tuple[int, ...], *, scale: float = 1.0, strided: bool = False, model: bool = False) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        if strided:  # halves of a fused gate_up projection
            both = random_tensor((*shape[:-1], 2 * shape[-1] + 1), dtype, generator)
            return {"gate": both[..., : shape[-1]], "up": both[..., shape[-1] : 2 * shape[-1]]}
        return {
            "gate": random_tensor(shape, dtype, generator, scale=scale),
            "up": random_tensor(shape, dtype, generator),
        }

    elements = 1
    for size in shape:
        elements *= size
    return Case(name, make, flops=6.0 * elements, bytes=lambda size: 3.0 * elements * size, model=model)


CASES = [
    _case("prefill", (262, 6144), model=True),
    _case("odd", (3, 5, 37)),
    _case("extreme", (4, 64), scale=60.0),
    _case("strided", (6, 33), strided=True),
    _case("empty", (0, 8)),
]
