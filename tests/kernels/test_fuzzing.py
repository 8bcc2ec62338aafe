"""The guard pages themselves: access to one byte too many must raise SIGSEGV, by any instruction."""

import ctypes
import faulthandler
import os
import signal
from collections.abc import Callable

import pytest
import torch
from fuzzing import Layouts, place
from kernel_selection import ISAS

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.testing import instruction_set


def _dies(action: Callable) -> bool:
    """Whether ``action``, in its own process, ends by SIGSEGV."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the child of a process that has used OpenMP hangs where it would start threads
        faulthandler.disable()
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] & 127 == signal.SIGSEGV


@pytest.mark.parametrize("at_end", [True, False])
def test_what_is_beside_and_what_is_read_only_is_felt(at_end):
    placed = place(5, torch.float32, at_end=at_end)
    first = placed.elements.data_ptr()
    assert not _dies(lambda: ctypes.memset(first, 0, 20))
    assert _dies(lambda: ctypes.string_at(first + 20 if at_end else first - 1, 1))
    placed.make_read_only()
    assert _dies(lambda: ctypes.memset(first, 0, 1)) and not _dies(lambda: ctypes.string_at(first, 20))


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_one_element_too_many_is_felt(dtype, rows):
    """Also by masked vector instructions: each operand of a matmul in turn is one element shorter than its sizes."""
    x, weight, bias = (Layouts(0)(torch.zeros(shape, dtype=dtype)) for shape in ((rows, 33), (5, 33), (5,)))
    large, extension = torch.zeros(200, 200, dtype=dtype), dispatch.extension()

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, n: int, k: int) -> Callable:
        w = extension.Weight(weight.data_ptr(), 33, bias.data_ptr())
        return lambda: extension.linear(x.data_ptr(), w, large.data_ptr(), rows, n, k, 33, n, DTYPE_CODES[dtype])

    for isa in ISAS:
        with instruction_set(isa):
            assert not _dies(product(x, weight, bias, 5, 33))
            assert _dies(product(x, large, large, 5, 34)) and _dies(product(large, weight, large, 5, 34))
            assert _dies(product(large, large, bias, 6, 33))
