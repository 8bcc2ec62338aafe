"""linear on GPUs: which kernel runs at which M, and weights that are misaligned for wide loads."""

import pytest
import torch

import qvl_kernels
from qvl_kernels.gpu import launch as gpu_launch
from qvl_kernels.ops.gemv import tiles
from qvl_kernels.ops.gemv.tiles import GEMV_ROWS
from qvl_kernels.testing import assert_close_to_fp64, random_tensor


def _rand(*shape: int, dtype=torch.float16, seed: int = 0) -> torch.Tensor:
    return random_tensor(shape, dtype, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "kind", "kernel"),
    [
        ((1, 64), torch.float16, "_gemv_fma_kernel"),
        ((2, 2, 64), torch.float16, "_gemv_fma_kernel"),
        ((5, 64), torch.float16, "_gemv_dot_kernel"),
        ((16, 64), torch.float16, "_gemv_dot_kernel"),
        ((16, 64), torch.float32, "_gemv_fma_kernel"),
        ((17, 64), torch.float16, None),
        ((2, 9, 64), torch.float32, None),
    ],
    ids=str,
)
def test_kernel_by_rows(shape, kind, kernel, device):
    x, weight = (_rand(*size, dtype=kind).to(device) for size in (shape, (10, 64)))
    with torch.no_grad(), qvl_kernels.use_backend("triton"), gpu_launch.record() as launches:
        qvl_kernels.linear(x, weight)
    assert [launch.kernel.__name__ for launch in launches] == ([] if kernel is None else [kernel])


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_weights(rows, offset, dtype, device):
    """Views that are not aligned to 16 bytes, with rows of odd lengths."""
    x = _rand(rows, 35, dtype=dtype).to(device)[:, :33]
    weight = _rand(6 * 40 + offset, dtype=dtype, seed=1)[offset:].view(6, 40).to(device)[:, :33]
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        out = qvl_kernels.linear(x, weight)
    assert_close_to_fp64(out, x @ weight.t(), x.double() @ weight.double().t())


def test_bytes_of_the_model_are_read_once():
    """Programs times weight rows of a tile: no weight row is loaded twice, for any tile."""
    for rows in range(1, GEMV_ROWS + 1):
        for bits in (0, 8, 4):
            tile = tiles.gemv_fma(rows, 2048, 2048, 2, bits, False, "sm_90")
            assert tile is None or tile["ROWS"] == rows, (rows, bits, tile)
