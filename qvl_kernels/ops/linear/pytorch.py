"""PyTorch's linear, where it is the faster kernel."""

import torch

__all__ = ["pytorch_linear"]


def pytorch_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch.nn.functional.linear with autocast off: callers of kernel functions have already chosen the dtypes."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return torch.nn.functional.linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)
