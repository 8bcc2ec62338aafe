"""Reference of linear_cross_entropy: its definition in PyTorch operations."""

import torch

__all__ = ["linear_cross_entropy_reference"]


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> torch.Tensor:
    logits = hidden @ weight.t()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(
        wide, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
