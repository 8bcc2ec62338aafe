"""Chunked MLPs: some tokens at a time, to save memory, since the intermediate activation is wider than x."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvl_kernels import dispatch

__all__ = ["check_chunk_size", "chunked", "set_chunk_size", "splits"]

_NAME = "mlp_rows"  # attribute of an MLP: tokens per chunk


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool)):
        raise TypeError(f"accelerate: mlp_rows must be an int or None, got {chunk_size!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"accelerate: mlp_rows must be at least 1, got {chunk_size}")


def set_chunk_size(mlp: nn.Module, chunk_size: int | None) -> None:
    if chunk_size is not None:
        setattr(mlp, _NAME, chunk_size)
    elif _NAME in mlp.__dict__:
        delattr(mlp, _NAME)


def splits(mlp: nn.Module, x: Tensor) -> bool:
    """Whether the MLP would split x [..., C] where a fused call would not, which is on GPUs. The fused call for CPUs
    keeps few tokens at a time by itself.
    """
    chunk_size = mlp.__dict__.get(_NAME)
    return (
        chunk_size is not None and x.numel() > chunk_size * x.shape[-1] and (x.is_cuda or dispatch.forced() == "triton")
    )


def chunked(mlp: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """forward(x) of ``mlp`` for x [..., C], in chunks if ``mlp`` has a chunk size; the backward recomputes them."""
    chunk_size = mlp.__dict__.get(_NAME)
    if chunk_size is None:
        return forward(x)
    training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in mlp.parameters()))
    tokens = x.numel() // x.shape[-1]
    if not training and tokens <= chunk_size:
        return forward(x)
    chunks = x.reshape(tokens, x.shape[-1]).split(chunk_size)
    outs = [checkpoint(forward, chunk, use_reentrant=False) if training else forward(chunk) for chunk in chunks]
    return torch.cat(outs).view(*x.shape[:-1], -1)
