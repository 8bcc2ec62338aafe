"""MLPs a part of the tokens at a time, for memory: what lies between their two products is several times as wide as the
rest.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvl_kernels import dispatch

__all__ = ["check_rows", "chunked", "set_rows", "splits"]

_NAME = "mlp_rows"  # attribute of an MLP: tokens at a time


def check_rows(rows: int | None) -> None:
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool)):
        raise TypeError(f"accelerate: mlp_rows must be an int or None, got {rows!r}")
    if rows is not None and rows < 1:
        raise ValueError(f"accelerate: mlp_rows must be at least 1, got {rows}")


def set_rows(mlp: nn.Module, rows: int | None) -> None:
    if rows is not None:
        setattr(mlp, _NAME, rows)
    elif _NAME in mlp.__dict__:
        delattr(mlp, _NAME)


def splits(mlp: nn.Module, x: Tensor) -> bool:
    """Whether the MLP would split x [..., C] where a fused call would not: on GPUs. On CPUs that call keeps few tokens
    anyway.
    """
    rows = mlp.__dict__.get(_NAME)
    return rows is not None and x.numel() > rows * x.shape[-1] and (x.is_cuda or dispatch.forced() == "triton")


def chunked(mlp: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """forward(x), ``mlp``'s way from x [..., C]; ``mlp_rows`` tokens at a time if it has that attribute, each part
    again in the backward.
    """
    rows = mlp.__dict__.get(_NAME)
    if rows is None:
        return forward(x)
    training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in mlp.parameters()))
    tokens = x.numel() // x.shape[-1]
    if not training and tokens <= rows:
        return forward(x)
    parts = x.reshape(tokens, x.shape[-1]).split(rows)
    outs = [checkpoint(forward, part, use_reentrant=False) if training else forward(part) for part in parts]
    return torch.cat(outs).view(*x.shape[:-1], -1)
