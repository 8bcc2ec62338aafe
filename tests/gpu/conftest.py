"""The Triton kernels: on a GPU where there is one, else interpreted (TRITON_INTERPRET=1, a process of its own; see
Makefile).
"""

import pytest
import torch

from qvl_kernels import config
from qvl_kernels.gpu import device as gpu_device
from qvl_kernels.gpu import launch as gpu_launch

RUNNABLE = gpu_device.unavailable() is None
collect_ignore_glob = [] if RUNNABLE else ["test_*.py"]
# The interpreter's bf16 is wrong (it multiplies raw bits), so bf16 is tested on a device only.
DTYPES = [torch.float32, torch.float16] if config.interpreted() else [torch.float32, torch.float16, torch.bfloat16]


torch.backends.cudnn.allow_tf32 = False  # TF32 would make stock's convolution of fp32 patches less accurate


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if config.interpreted() else "cuda")


@pytest.fixture
def launches_of(monkeypatch):
    """Returns a list that receives grid, arguments and options of each launch of a module's kernels."""

    def spy(module) -> list[dict]:
        launches = []

        def launch(kernel, grid, **arguments):
            launches.append({**arguments, "grid": grid})
            gpu_launch.launch(kernel, grid, **arguments)

        monkeypatch.setattr(module, "launch", launch)
        return launches

    return spy


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=str)
