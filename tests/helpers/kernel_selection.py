"""Every kernel selection on the CPU, forced: the instruction sets of this machine, the emulated one, PyTorch's kernels.

fp32, bf16 and fp16 take the fma or the dot instructions of an instruction set, as
``qvl_kernels.cpu_info()["gemm_backend"]`` says.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

import qvl_kernels
from qvl_kernels import tuning
from qvl_kernels.ops.attention import selection as attention_selection
from qvl_kernels.testing import instruction_set

ISAS = qvl_kernels.cpu_info()["supported"]
TILE_ISAS = ("amx", "amx_emulated")  # those with matrix units
OVERREADING = "pytorch_overreading"
MATMULS = {"linear", "patch_embed", "linear_cross_entropy", "decoder_layer", "vision_block"}
ROUTED = {*MATMULS, "quantized_linear", "attention", "cross_attention"}  # ops that may go to PyTorch's kernels


def selections(op: str, dtype: torch.dtype, *, overreading: bool = False) -> list[str]:
    """Names for ``select``. PyTorch's attention rounds probabilities, and its linear for quantised weights does not
    round activations: other bounds than those of our kernels.
    """
    if op not in MATMULS:
        return ISAS
    return [*ISAS, tuning.PYTORCH, *([OVERREADING] if overreading and dtype is torch.bfloat16 else [])]


@contextlib.contextmanager
def select(name: str) -> Iterator[None]:
    """Forces these kernels inside the block: of an instruction set, or PyTorch's wherever they are offered, for short
    attention too. OVERREADING: PyTorch's with AMX, which read past the end of rows, emulated where there is none.
    """
    by_pytorch = name in (tuning.PYTORCH, OVERREADING)
    with contextlib.ExitStack() as stack:
        backend = tuning.PYTORCH if by_pytorch else tuning.QVL
        stack.enter_context(mock.patch.object(tuning, "chosen", lambda kind: backend))
        if not by_pytorch:
            stack.enter_context(instruction_set(name))
        else:
            stack.enter_context(mock.patch.object(attention_selection, "MIN_TOKENS", 1))
        if name == OVERREADING and not torch.cpu._is_amx_tile_supported():
            stack.enter_context(mock.patch.object(torch.nn.functional, "linear", _overreading_linear))
        yield


def _overreading_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear as oneDNN 3.12 computes it: the last tile reads past the end of each row of x, multiplied by zeros of
    the padded weight.
    """
    k = x.shape[-1]
    more = -k % tuning.TILE_K if x.dtype is torch.bfloat16 else 0
    rows, zeros = x.reshape(-1, k), x.new_zeros(more)
    behind = rows.untyped_storage().nbytes() // x.element_size() - rows.storage_offset()
    memory = torch.cat((rows.as_strided((behind,), (1,)), zeros))  # nothing is read past the end of the storage
    rows = memory.as_strided((rows.shape[0], k + more), rows.stride())
    return _linear(rows, torch.nn.functional.pad(weight, (0, more)), bias).view(*x.shape[:-1], weight.shape[0])


_linear = torch.nn.functional.linear
