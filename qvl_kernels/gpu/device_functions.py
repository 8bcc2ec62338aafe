"""Triton device functions, and a constant, that more than one op needs."""

import triton
import triton.language as tl

__all__ = ["LOG2E", "caches_of_table", "griddepcontrol_wait", "tile_pointers", "visible_of_table"]

LOG2E = tl.constexpr(1.4426950408889634)  # softmax to base 2


@triton.jit
def griddepcontrol_wait(PDL: tl.constexpr):
    """PDL (programmatic dependent launch): lets the next kernel start, then waits for the previous kernel's results.

    Before this call a kernel may read weights only, since the previous kernel may still run.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def tile_pointers(view, rows, cols):
    """Pointers [rows, cols] into a RowsView."""
    return view.ptr + rows[:, None] * view.stride + cols[None, :]


@triton.jit
def caches_of_table(table_ptr, like_ptr):
    """(keys, values, capacity) of a layer from its row of GrowingCaches.table; the caches have ``like_ptr``'s dtype.

    The compiler cannot know the alignment of a loaded address, so it is promised here: else loads would not be 16 bytes
    wide.
    """
    k_ptr = tl.multiple_of(tl.load(table_ptr).to(like_ptr.dtype), 16)
    v_ptr = tl.multiple_of(tl.load(table_ptr + 1).to(like_ptr.dtype), 16)
    return k_ptr, v_ptr, tl.multiple_of(tl.load(table_ptr + 2), 16)


@triton.jit
def visible_of_table(table_ptr):
    """(attention mask, its row stride) from the same row of the table."""
    return tl.multiple_of(tl.load(table_ptr + 3).to(tl.pointer_type(tl.uint8)), 16), tl.multiple_of(
        tl.load(table_ptr + 4), 16
    )
