"""Triton device functions that more than one op needs."""

import triton
import triton.language as tl

__all__ = ["griddepcontrol_wait", "caches_of_table", "visible_of_table"]


@triton.jit
def griddepcontrol_wait(DEPENDENT_LAUNCH: tl.constexpr):
    """Before it, a kernel that may be launched while the one before it still runs touches weights at most: lets the
    next one come, then waits for the results of the one before.
    """
    if DEPENDENT_LAUNCH:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def caches_of_table(table_ptr, like_ptr):
    """(keys, values, capacity) of a layer from its row of GrowingCaches.table; the caches' dtype is that of
    ``like_ptr``.

    Alignment that the compiler cannot see behind an address is promised here: without it loads are not of 16 bytes.
    """
    k_ptr = tl.multiple_of(tl.load(table_ptr).to(like_ptr.dtype), 16)
    v_ptr = tl.multiple_of(tl.load(table_ptr + 1).to(like_ptr.dtype), 16)
    return k_ptr, v_ptr, tl.multiple_of(tl.load(table_ptr + 2), 16)


@triton.jit
def visible_of_table(table_ptr):
    """(mask, stride of its rows), as ``caches_of_table``."""
    return tl.multiple_of(tl.load(table_ptr + 3).to(tl.pointer_type(tl.uint8)), 16), tl.multiple_of(
        tl.load(table_ptr + 4), 16
    )
