"""What a key/value cache must be, as kernels write to it: dense, without elements that lie on one another, apart from
what is read.
"""

import torch

from qvl_kernels import checks
from qvl_kernels.library import is_eligible

__all__ = ["check_apart", "check_caches"]


def check_caches(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """TypeError or ValueError unless both are [B, Hkv, S_cap, D] of one shape, dtype and device that a kernel may write
    to.
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
    if k_cache is v_cache and k_cache.numel() or _share(k_cache, _stretch(k_cache), v_cache, _stretch(v_cache)):
        raise ValueError(f"{op}: k_cache and v_cache share memory; give each its own")


def check_apart(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """ValueError if one of the tensors (None is skipped), which are read while the caches are written, shares memory
    with them.
    """
    caches = [(cache, _stretch(cache)) for cache in (k_cache, v_cache)]
    for name, x in tensors.items():
        if x is not None:
            stretch = _stretch(x)
            if any(_share(x, stretch, *cache) for cache in caches):
                raise ValueError(
                    f"{op}: {name} shares memory with a cache, which is written to meanwhile; give {name}.clone()"
                )


def _overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two elements may lie in one place: not if every step is longer than all that the smaller steps reach."""
    dims = [(stride, i, size - 1) for i, (size, stride) in enumerate(zip(x.shape, x.stride())) if size > 1]
    return any(stride <= sum(s * count for s, j, count in dims if (s, j) < (stride, i)) for stride, i, _ in dims)


def _stretch(x: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor and the one behind its last element; nothing where its memory is not known."""
    if torch.compiler.is_compiling() or not x.numel() or not is_eligible(x, x.device.type):
        return 0, 0
    begin = x.data_ptr()
    reach = (
        x.numel() if x.is_contiguous() else 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    ) * x.element_size()
    return begin, begin + reach


def _share(a: torch.Tensor, a_stretch: tuple[int, int], b: torch.Tensor, b_stretch: tuple[int, int]) -> bool:
    """Whether two tensors of a device have an element in one place; of unequal strides, whether their stretches of
    memory meet.
    """
    if a_stretch[0] >= b_stretch[1] or b_stretch[0] >= a_stretch[1]:
        return False
    if (
        a.stride() != b.stride()
        or a.shape != b.shape
        or a.dtype != b.dtype
        or (a_stretch[0] - b_stretch[0]) % a.element_size()
    ):
        return True
    return _reached((a_stretch[0] - b_stretch[0]) // a.element_size(), sorted(zip(a.stride(), a.shape), reverse=True))


def _reached(offset: int, dims: list[tuple[int, int]]) -> bool:
    """Whether ``offset`` is a difference of two places in a tensor of these (stride, size), longest stride first."""
    if not dims:
        return offset == 0
    (stride, size), *rest = dims
    reach = sum(s * (count - 1) for s, count in rest)
    low, high = -((reach - offset) // stride), (offset + reach) // stride
    return any(_reached(offset - steps * stride, rest) for steps in range(max(low, 1 - size), min(high, size - 1) + 1))
