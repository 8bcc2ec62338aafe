"""Reference of gelu_tanh: its definition in PyTorch operations."""

import torch

__all__ = ["gelu_tanh_reference"]


def gelu_tanh_reference(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.gelu(x if bias is None else x + bias, approximate="tanh")
