import torch

from qvl_kernels.ops.attention.reference import attention_reference

__all__ = ["decode_attention_reference"]


def decode_attention_reference(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    outs = []
    for b, length in enumerate(lengths.tolist()):
        k, v = (cache[b : b + 1, :, :length].transpose(1, 2) for cache in (k_cache, v_cache))
        row_mask = None
        if mask is not None:
            row_mask = mask[b if mask.shape[0] > 1 else 0][None, ..., :length]
        outs.append(attention_reference(q[b : b + 1], k, v, causal=mask is None, scale=scale, mask=row_mask)[0])
    return torch.cat(outs) if outs else torch.empty_like(q)
