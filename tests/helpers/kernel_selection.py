"""Every kernel selection of matmuls on the CPU, forced: the instruction sets that this machine has, and oneDNN.

fp32, bf16 and fp16 take the fma or the dot instructions of an instruction set, as
``qvl_kernels.cpu_info()["gemm_route"]`` says.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

import qvl_kernels
from qvl_kernels.ops.linear import onednn
from qvl_kernels.testing import instruction_set

ISAS = qvl_kernels.cpu_info()["supported"]
MATMULS = {
    "linear",
    "patch_embed",
    "linear_cross_entropy",
    "decoder_layer",
    "vision_block",
}  # ops that may go through oneDNN


def selections(op: str, dtype: torch.dtype, *, amx: bool = False) -> list[str]:
    by_onednn = ["onednn", "amx"] if amx else ["onednn"]
    return [*ISAS, *by_onednn] if op in MATMULS and dtype is torch.bfloat16 else ISAS


@contextlib.contextmanager
def select(name: str) -> Iterator[None]:
    """Forces these kernels for matmuls inside the block. "amx": oneDNN's, emulated where there is no AMX."""
    by_onednn = name in ("onednn", "amx")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(onednn, "onednn_is_faster", lambda: by_onednn))
        if not by_onednn:
            stack.enter_context(instruction_set(name))
        elif name == "amx" and not torch.cpu._is_amx_tile_supported():
            stack.enter_context(mock.patch.object(torch.nn.functional, "linear", _overreading_linear))
        yield


def _overreading_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear as oneDNN 3.12 computes it: the last tile reads past the end of each row of x, multiplied by zeros of
    the padded weight.
    """
    k = x.shape[-1]
    more = -k % onednn.TILE_K if x.dtype is torch.bfloat16 else 0
    rows, zeros = x.reshape(-1, k), x.new_zeros(more)
    behind = rows.untyped_storage().nbytes() // x.element_size() - rows.storage_offset()
    memory = torch.cat((rows.as_strided((behind,), (1,)), zeros))  # nothing is read past the end of the storage
    rows = memory.as_strided((rows.shape[0], k + more), rows.stride())
    return _linear(rows, torch.nn.functional.pad(weight, (0, more)), bias).view(*x.shape[:-1], weight.shape[0])


_linear = torch.nn.functional.linear
