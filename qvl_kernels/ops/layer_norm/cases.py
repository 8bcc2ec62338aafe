"""Cases of layer_norm: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.ops.rms_norm.cases import ADD_CASES as RMS_ADD_CASES
from qvl_kernels.ops.rms_norm.cases import CASES as RMS_CASES
from qvl_kernels.testing import Case, random_tensor

__all__ = ["ADD_CASES", "CASES"]


def _with_bias(case: Case) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        arguments = case.make(dtype, generator)
        return {**arguments, "bias": random_tensor(tuple(arguments["weight"].shape), dtype, generator)}

    return Case(case.name, make, flops=case.flops * 1.5, bytes=case.bytes, model=case.model)


# A row of one element has no variance: its exact gradient is 0, and a computed one is rounding noise.
CASES = [_with_bias(case) for case in RMS_CASES if case.name != "one_element"]
ADD_CASES = [_with_bias(case) for case in RMS_ADD_CASES if case.name != "one_element"]
