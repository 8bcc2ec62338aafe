"""torch op qvl::decode_attention; inference only."""

from typing import Any

import torch

from qvl_kernels.library import register
from qvl_kernels.ops.decode_attention.cpu import decode_attention_cpu

__all__ = ["decode_attention_op"]


def _launch_decode_attention(*args: Any) -> Any:
    from qvl_kernels.ops.decode_attention.triton_decode import launch_decode_attention

    return launch_decode_attention(*args)


# ``table``: a layer's row of GrowingCaches.table, from which GPU kernels read the addresses of caches and mask.
decode_attention_op = register(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? mask, Tensor? k_scale, "
    "Tensor? v_scale,"
    " float scale, Tensor? table=None) -> Tensor",
    cpu=decode_attention_cpu,
    triton=_launch_decode_attention,
    fake=lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device),
)
