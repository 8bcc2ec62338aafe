"""Arguments that the forward and backward attention kernels share."""

from typing import NamedTuple

import torch

from qvl_kernels.gpu.device_functions import LOG2E
from qvl_kernels.gpu.tiles import cdiv
from qvl_kernels.gpu.views import mask_kind_and_view

__all__ = ["LENGTHS", "Layout", "Mode"]

# Kernel arguments that change from call to call; specialising on them would recompile without faster code.
LENGTHS = ("T", "S", "sequences", "threshold", "scale")


class Mode(NamedTuple):
    """Constants of a call. MASK: 0 none, 1 bool, 2 additive; MASK_ROWS: it differs between rows."""

    GROUP: int
    HEAD_DIM: int
    VARLEN: bool
    HAS_COUNTS: bool
    CAUSAL: bool
    MASK: int
    MASK_ROWS: bool
    DROPOUT: bool


class Layout:
    """Sizes, mask and sequences of one call: ``arguments`` are those that forward and backward kernels share."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        key_counts: torch.Tensor | None,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
        seed: torch.Tensor | None,
    ) -> None:
        self.varlen = cu_seqlens is not None
        self.batch = 1 if self.varlen else q.shape[0]
        self.queries, self.heads, self.head_dim = q.shape[-3:]
        self.keys, self.kv_heads = k.shape[-3], k.shape[-2]
        self.sequences = cu_seqlens.numel() - 1 if self.varlen else 0
        kind, masks = mask_kind_and_view(mask, (self.batch, self.heads, self.queries, self.keys), q)
        self.mode = Mode(
            GROUP=self.heads // self.kv_heads,
            HEAD_DIM=self.head_dim,
            VARLEN=self.varlen,
            HAS_COUNTS=key_counts is not None,
            CAUSAL=causal,
            MASK=kind,
            MASK_ROWS=mask is not None and mask.shape[1:3] != (1, 1),
            DROPOUT=dropout_p > 0.0,
        )
        self.arguments = {
            "mask_view": masks,
            "cu_seqlens_ptr": q if cu_seqlens is None else cu_seqlens.to(q.device, non_blocking=True),
            "key_counts_ptr": q if key_counts is None else key_counts,
            "seed_ptr": q if seed is None else seed,
            "T": self.queries,
            "S": self.keys,
            "H": self.heads,
            "sequences": self.sequences,
            "scale": scale * LOG2E.value,
            "threshold": int(dropout_p * 2**31),
            "keep_scale": 1.0 / (1.0 - dropout_p),
            "mode": self.mode,
        }

    def programs(self, block: int, *, by_keys: bool = False) -> int:
        """The size of the grid. It depends on shapes only, not on the values of ``cu_seqlens``."""
        if self.varlen:
            blocks = self.queries // block + self.sequences + 1
        else:
            blocks = cdiv(self.keys if by_keys else self.queries, block)
        return blocks * (self.kv_heads if by_keys else self.heads) * self.batch
