"""The ways that products can take on the CPU, each forced: kernels of every instruction set of this machine, and oneDNN.

fp32, bf16 and fp16 take the fma or the dot instructions of an instruction set, as ``qvl_kernels.cpu_info()["gemm_route"]`` says.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

import qvl_kernels
from qvl_kernels.ops.linear import onednn
from qvl_kernels.testing import instruction_set

ISAS = qvl_kernels.cpu_info()["supported"]
PRODUCTS = {"linear", "patch_embed", "linear_cross_entropy", "decoder_layer", "vision_block"}  # ops that may go through oneDNN


def routes(op: str, dtype: torch.dtype) -> list[str]:
    return [*ISAS, "onednn"] if op in PRODUCTS and dtype is torch.bfloat16 else ISAS


@contextlib.contextmanager
def route(name: str) -> Iterator[None]:
    """Products inside the block go this way, whichever the machine would choose. "amx": through oneDNN, emulated where this machine
    has no AMX."""
    through_onednn = name in ("onednn", "amx")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(onednn, "onednn_is_faster", lambda: through_onednn))
        if not through_onednn:
            stack.enter_context(instruction_set(name))
        elif name == "amx" and not torch.cpu._is_amx_tile_supported():
            stack.enter_context(mock.patch.object(torch.nn.functional, "linear", _overreading_linear))
        yield


def _overreading_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As oneDNN 3.12 computes it: the last tile of each row of x goes on past its end, over zeros in the weight's."""
    k = x.shape[-1]
    more = -k % onednn.TILE_K if x.dtype is torch.bfloat16 else 0
    rows, zeros = x.reshape(-1, k), x.new_zeros(more)
    behind = rows.untyped_storage().nbytes() // x.element_size() - rows.storage_offset()
    memory = torch.cat((rows.as_strided((behind,), (1,)), zeros))  # past the end of memory nothing is read
    rows = memory.as_strided((rows.shape[0], k + more), rows.stride())
    return _linear(rows, torch.nn.functional.pad(weight, (0, more)), bias).view(*x.shape[:-1], weight.shape[0])


_linear = torch.nn.functional.linear
