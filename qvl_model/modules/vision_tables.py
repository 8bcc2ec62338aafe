"""Index tables of the vision tower, computed once per set of image sizes instead of in every forward.

They depend on sizes and settings alone. Stock code computes from them, in every call, what depends on weights.
"""

import weakref
from collections import OrderedDict

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_attention_seqlens, get_vision_interpolation_indices_and_weights

from qvl_kernels.library import ops_are_seen

__all__ = ["provide_tables"]

KEPT = 16  # sets of image sizes per model, those used last
KEPT_PATCHES = 1 << 15  # patches of all sets together, unless one set alone has more
_NAMES = ("position_ids", "interp_indices", "interp_weights", "cu_seqlens", "max_seqlen")
_kept: "weakref.WeakKeyDictionary[nn.Module, OrderedDict[tuple, dict]]" = weakref.WeakKeyDictionary()


def provide_tables(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a stock vision model: hands it the tables that it would compute from ``grid_thw``."""
    grid = args[1] if len(args) > 1 else kwargs.get("grid_thw")
    if (
        torch.compiler.is_compiling()
        or ops_are_seen()
        or not isinstance(grid, Tensor)
        or any(name in kwargs for name in _NAMES)
    ):
        return None
    sizes, merge = tuple(map(tuple, grid.tolist())), model.spatial_merge_size
    if any(len(size) != 3 or min(size) < 1 or size[1] % merge or size[2] % merge for size in sizes):
        return None  # stock code raises the error
    settings = (
        model.num_grid_per_side,
        merge,
        model.config.spatial_merge_size,
        model.interpolation_mode,
        model.interpolation_align_corners,
        model.config._attn_implementation,
    )
    key = (sizes, grid.device, *settings)
    kept = _kept.setdefault(model, OrderedDict())
    if key not in kept:
        with torch.inference_mode(False):  # tables made here may be used by training later
            kept[key] = _tables(model, torch.tensor(sizes, dtype=torch.int64), grid.device)
        while (
            len(kept) > KEPT
            or len(kept) > 1
            and sum(len(tables["position_ids"]) for tables in kept.values()) > KEPT_PATCHES
        ):
            kept.popitem(last=False)
    kept.move_to_end(key)
    # Copies, since a hook may write into the model's arguments.
    return args, kwargs | {
        name: table.clone() if isinstance(table, Tensor) else table for name, table in kept[key].items()
    }


def _tables(model: nn.Module, grid: Tensor, device: torch.device) -> dict:
    """Computed on the CPU and then copied: on a GPU a few kilobytes would take dozens of kernel launches."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=model.num_grid_per_side,
        mode=model.interpolation_mode,
        align_corners=model.interpolation_align_corners,
        spatial_merge_size=model.config.spatial_merge_size,
    )
    cu_seqlens, max_seqlen = get_vision_attention_seqlens(grid, model.config)
    # cu_seqlens goes to the device of the kernels: CPU kernels check it, GPU kernels read it there.
    tables = {
        "position_ids": _positions(grid, model.spatial_merge_size),
        "interp_indices": indices,
        "interp_weights": weights,
        "cu_seqlens": cu_seqlens,
    }
    return {name: table.to(device) for name, table in tables.items()} | (
        {} if max_seqlen is None else {"max_seqlen": max_seqlen}
    )


def _positions(grid: Tensor, merge: int) -> Tensor:
    """(row, column) [N, 2] of every patch of the images ``grid`` [images, 3], merge x merge block by block."""
    counts = grid.prod(1)
    image = torch.repeat_interleave(torch.arange(len(grid)), counts)
    first = (counts.cumsum(0) - counts)[image]
    height, width = grid[image, 1], grid[image, 2]
    within = (torch.arange(int(counts.sum())) - first) % (height * width)
    block, inner = within // merge**2, within % merge**2
    blocks_wide = width // merge
    return torch.stack((block // blocks_wide * merge + inner // merge, block % blocks_wide * merge + inner % merge), 1)
