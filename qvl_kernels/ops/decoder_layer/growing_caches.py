"""KV caches that grow while a captured CUDA graph stays valid."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["GrowingCaches"]

GRAIN = 64  # capacities are multiples of it
KEYS, VALUES, CAPACITY, MASK, MASK_STRIDE = range(5)  # columns of the table; gpu/device_functions.py reads them
COLUMNS = 8  # 64 bytes per row


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Inside, new tensors are not inference tensors: caches made in inference mode also serve calls outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class GrowingCaches:
    """KV caches of all layers for ``decode_step``, with a table on the device that holds their addresses.

    A captured graph holds only the table's address, so it stays valid while the caches grow. All calls, graph replays
    included, must come from one stream or be ordered by events: changes of the table and reuse of freed memory then
    follow the work that was queued before.

    Args:
        layers, rows: how many. kv_heads, head_dim, dtype, device: of every layer's keys and values.
    Attributes:
        sizes: (dtype, rows, Hkv, D).
        keys, values: of each layer [rows, Hkv, its capacity, D]. Growth replaces them: do not keep them.
        mask: attention mask bool [rows, capacity or more], False at padding, shared by the layers; growth replaces
        it
            too.
        table: int64 [layers, 8] on the device. entries: its rows: per layer the addresses of keys and values, the
            capacity, and address and row stride of ``mask``.
    Example:
        >>> caches = GrowingCaches(28, 1, 8, 128, torch.bfloat16, torch.device("cuda"))
        >>> for index, layer in enumerate(cache.layers):
        ...     caches.take(index, layer.keys, layer.values, length=300)
        >>> caches.set_mask(None)
        >>> caches.reserve(301)
    """

    def __init__(
        self, layers: int, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sizes = (dtype, rows, kv_heads, head_dim)
        with _ordinary_tensors():
            self.keys, self.values = (
                [torch.empty((rows, kv_heads, 0, head_dim), dtype=dtype, device=device) for _ in range(layers)]
                for _ in range(2)
            )
            self.mask = torch.empty((rows, 0), dtype=torch.bool, device=device)
            self.table = torch.zeros((layers, COLUMNS), dtype=torch.int64, device=device)
            self.entries = [self.table[index] for index in range(layers)]

    @property
    def capacity(self) -> int:
        """Positions that every layer has room for."""
        return min(keys.shape[2] for keys in self.keys)

    @_ordinary_tensors()
    def reserve(self, length: int, *, limit: int | None = None) -> None:
        """Makes room for ``length`` positions in every layer. Capacity grows by half, or to ``length`` if that is more,
        but not beyond ``limit``, a length that is known to suffice.

        Layers grow one by one, so that at most one layer is in memory twice. New positions are not initialised:
        kernels read only those below a row's length. Raises RuntimeError (torch.OutOfMemoryError included); the caches
        then stay valid with their contents.
        """
        before = self.capacity
        if length <= before:
            return
        half_more = before + before // 2
        if limit is not None:
            half_more = min(half_more, _rounded(limit))
        wanted = max(_rounded(length), half_more // GRAIN * GRAIN)
        self._widen_mask(wanted)
        for index in range(len(self.keys)):
            self._grow(index, wanted)

    @_ordinary_tensors()
    def take(self, index: int, keys: torch.Tensor, values: torch.Tensor, *, length: int) -> None:
        """Copies keys and values [B <= rows, Hkv, L, D] to the first positions of a layer and makes room for ``length``
        >= L; its former contents are lost. Raises ValueError for other shapes, and RuntimeError if memory runs out:
        the layer is then empty.
        """
        _, rows, kv_heads, head_dim = self.sizes
        batch, taken = keys.shape[0], keys.shape[2]
        shape = (batch, kv_heads, taken, head_dim)
        if keys.shape != shape or values.shape != shape or batch > rows or taken > length:
            raise ValueError(
                f"GrowingCaches: keys and values must be [B <= {rows}, {kv_heads}, L <= {length}, {head_dim}], got "
                f"{tuple(keys.shape)} and {tuple(values.shape)}"
            )
        wanted = _rounded(length)
        self._widen_mask(wanted)
        if self.keys[index].shape[2] < wanted:
            self._empty(index)  # frees the old memory first
            self._set(index, *(_longer(x, wanted) for x in (self.keys[index], self.values[index])))
        self.keys[index][:batch, :, :taken].copy_(keys)
        self.values[index][:batch, :, :taken].copy_(values)

    @_ordinary_tensors()
    def set_mask(self, mask: torch.Tensor | None) -> None:
        """Sets the attention mask: bool [B <= rows, L] of the first keys; all other keys are visible, with None all."""
        self.mask.fill_(True)
        if mask is not None:
            self.mask[: mask.shape[0], : mask.shape[1]].copy_(mask)

    def give(self, index: int, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the first ``length`` keys and values of the first ``batch`` rows of a layer, [B, Hkv, L, D] each.
        Raises ValueError if the layer has fewer.
        """
        if batch > self.sizes[1] or length > self.keys[index].shape[2]:
            raise ValueError(
                f"GrowingCaches: layer {index} has {self.sizes[1]} rows of {self.keys[index].shape[2]} positions, "
                f"got batch {batch}, length {length}"
            )
        return self.keys[index][:batch, :, :length].clone(), self.values[index][:batch, :, :length].clone()

    @_ordinary_tensors()
    def clear(self) -> None:
        """Frees keys and values; every layer is then empty, for kernels too."""
        for index in range(len(self.keys)):
            self._empty(index)

    def _widen_mask(self, wanted: int) -> None:
        """Called before the layers grow, so that no layer is longer than the mask."""
        before = self.mask.shape[1]
        if before < wanted:
            mask = torch.ones((self.sizes[1], wanted), dtype=torch.bool, device=self.mask.device)
            mask[:, :before].copy_(self.mask)
            self.mask = mask
            self.table[:, MASK].fill_(mask.data_ptr())
            self.table[:, MASK_STRIDE].fill_(wanted)

    def _empty(self, index: int) -> None:
        self._set(index, *(x[index][:, :, :0].clone() for x in (self.keys, self.values)))

    def _grow(self, index: int, wanted: int) -> None:
        old = self.keys[index], self.values[index]
        before = old[0].shape[2]
        if before < wanted:  # a layer may have grown in an earlier call that ran out of memory
            new = [_longer(x, wanted) for x in old]
            for longer, x in zip(new, old):
                longer[:, :, :before].copy_(x)
            self._set(index, *new)

    def _set(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replaces a layer's memory. Kernels write the table in stream order: replays that are already queued still
        read the old entries and the old memory, which PyTorch's allocator gives only to later work of the same stream.
        """
        self.keys[index], self.values[index] = keys, values
        entry = self.entries[index]
        entry[KEYS].fill_(keys.data_ptr())
        entry[VALUES].fill_(values.data_ptr())
        entry[CAPACITY].fill_(keys.shape[2])


def _rounded(length: int) -> int:
    return -(-length // GRAIN) * GRAIN


def _longer(x: torch.Tensor, capacity: int) -> torch.Tensor:
    """Uninitialised memory like x for ``capacity`` positions."""
    return torch.empty((*x.shape[:2], capacity, x.shape[3]), dtype=x.dtype, device=x.device)
