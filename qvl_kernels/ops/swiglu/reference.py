"""Reference of swiglu: its definition in PyTorch operations."""

import torch

__all__ = ["swiglu_reference"]


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up
