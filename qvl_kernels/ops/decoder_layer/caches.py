"""Checks of a KV cache that kernels write to: dense, no overlap inside it, none with tensors that are read."""

import torch

from qvl_kernels import checks
from qvl_kernels.library import is_eligible

__all__ = ["check_apart", "check_caches"]


def check_caches(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """TypeError or ValueError unless both are [B, Hkv, S_cap, D] of one shape, dtype and device, and a kernel may write
    to them.
    """
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    for name, cache in caches.items():
        checks.check_tensor(op, name, cache, 4)
    checks.check_shape(op, "v_cache", v_cache, tuple(k_cache.shape))
    checks.check_same(op, **caches)
    if k_cache.shape[1] < 1 or k_cache.shape[3] < 2 or k_cache.shape[3] % 2:
        raise ValueError(
            f"{op}: caches must have at least 1 key/value head and an even head_dim, to rotate halves, got shape "
            f"{tuple(k_cache.shape)}"
        )
    for name, cache in caches.items():
        checks.check_memory(op, name, cache)
        if cache.requires_grad:
            raise ValueError(f"{op}: {name} needs a gradient, which writing to it would falsify; give {name}.detach()")
        if cache.numel() and _overlaps_itself(cache):
            raise ValueError(
                f"{op}: elements of {name} share memory, got strides {tuple(cache.stride())}; call "
                f"{name}.contiguous() first"
            )
    if (
        k_cache is v_cache
        and k_cache.numel()
        or _share(k_cache, _address_range(k_cache), v_cache, _address_range(v_cache))
    ):
        raise ValueError(f"{op}: k_cache and v_cache share memory; give each its own")


def check_apart(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """ValueError if one of the tensors (None is skipped) shares memory with the caches: they are read while the caches
    are written.
    """
    caches = [(cache, _address_range(cache)) for cache in (k_cache, v_cache)]
    for name, x in tensors.items():
        if x is not None:
            address_range = _address_range(x)
            if any(_share(x, address_range, *cache) for cache in caches):
                raise ValueError(
                    f"{op}: {name} shares memory with a cache, which is written to meanwhile; give {name}.clone()"
                )


def _overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two elements may share an address. They cannot if each stride exceeds the extent of all smaller ones."""
    dims = [(stride, i, size - 1) for i, (size, stride) in enumerate(zip(x.shape, x.stride())) if size > 1]
    return any(stride <= sum(s * count for s, j, count in dims if (s, j) < (stride, i)) for stride, i, _ in dims)


def _address_range(x: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor and the one behind its last element; (0, 0) if the addresses are not known."""
    if torch.compiler.is_compiling() or not x.numel() or not is_eligible(x, x.device.type):
        return 0, 0
    begin = x.data_ptr()
    reach = (
        x.numel() if x.is_contiguous() else 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    ) * x.element_size()
    return begin, begin + reach


def _share(a: torch.Tensor, a_range: tuple[int, int], b: torch.Tensor, b_range: tuple[int, int]) -> bool:
    """Whether two tensors of a device share an element; if strides differ, whether their address ranges overlap."""
    if a_range[0] >= b_range[1] or b_range[0] >= a_range[1]:
        return False
    if (
        a.stride() != b.stride()
        or a.shape != b.shape
        or a.dtype != b.dtype
        or (a_range[0] - b_range[0]) % a.element_size()
    ):
        return True
    return _reached((a_range[0] - b_range[0]) // a.element_size(), sorted(zip(a.stride(), a.shape), reverse=True))


def _reached(offset: int, dims: list[tuple[int, int]]) -> bool:
    """Whether ``offset`` is a distance between elements of a tensor of these (stride, size), longest stride first."""
    if not dims:
        return offset == 0
    (stride, size), *rest = dims
    reach = sum(s * (count - 1) for s, count in rest)
    low, high = -((reach - offset) // stride), (offset + reach) // stride
    return any(_reached(offset - steps * stride, rest) for steps in range(max(low, 1 - size), min(high, size - 1) + 1))
