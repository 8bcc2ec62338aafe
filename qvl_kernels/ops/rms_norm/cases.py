"""Cases of rms_norm: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.testing import Case, random_tensor

__all__ = ["ADD_CASES", "CASES"]


def _case(name: str, shape: tuple[int, ...], *, model: bool = False, strided: bool = False, scale: float = 1.0) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        x = random_tensor(shape, dtype, generator, scale=scale)
        if strided:  # rows of a wider buffer, misaligned
            wide = random_tensor((*shape[:-1], shape[-1] + 7), dtype, generator, scale=scale)
            x = wide[..., 3 : 3 + shape[-1]]
        return {"x": x, "weight": random_tensor(shape[-1:], dtype, generator), "eps": 1e-6}

    elements = 1
    for size in shape:
        elements *= size
    return Case(name, make, flops=4.0 * elements, bytes=lambda size: (2.0 * elements + shape[-1]) * size, model=model)


def _with_residual(case: Case) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        arguments = case.make(dtype, generator)
        return {**arguments, "residual": random_tensor(tuple(arguments["x"].shape), dtype, generator)}

    return Case(case.name, make, flops=case.flops * 1.25, bytes=lambda size: 2 * case.bytes(size), model=case.model)


CASES = [
    _case("decode", (1, 2048), model=True),
    _case("prefill", (262, 2048), model=True),
    _case("one_element", (3, 1)),
    _case("prime", (7, 131)),
    _case("rank_3_odd", (2, 5, 37)),
    _case("strided", (6, 100), strided=True),
    _case("large_values", (4, 96), scale=1000.0),
    _case("empty", (0, 64)),
    _case("vector", (70,)),
]
ADD_CASES = [_with_residual(case) for case in CASES]
