"""A minimal Triton kernel that probes whether launches work on a device."""

import torch
import triton
import triton.language as tl

__all__ = ["probe"]


@triton.jit
def _one(x_ptr):  # noqa: ANN001, ANN202
    tl.store(x_ptr, 1.0)


def probe(device: torch.device) -> None:
    """Compiles and launches the kernel; raises what Triton or the driver raises."""
    _one[(1,)](torch.empty(1, dtype=torch.float32, device=device))
