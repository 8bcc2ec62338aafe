"""Position tables of the vision tower, made once per set of image sizes instead of once per forward and image by image."""

import weakref
from collections import OrderedDict

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock
from transformers.vision_utils import get_vision_attention_seqlens, get_vision_interpolation_indices_and_weights

from qvl_model.modules.plain import is_plain

__all__ = ["Embedding", "Qwen3VLVisionRotaryEmbedding", "provide_tables"]

KEPT = 16  # sets of image sizes per model, those used last
KEPT_PATCHES = 1 << 15  # and of all of them together, unless one alone has more
KEPT_ROWS = 1 << 12  # patches of which the interpolated rows are kept too: those of more are megabytes, and made in a hundredth of the tower's time
_NAMES = ("position_ids", "interp_indices", "interp_weights", "cu_seqlens", "max_seqlen")
_kept: "weakref.WeakKeyDictionary[nn.Module, OrderedDict[tuple, dict]]" = weakref.WeakKeyDictionary()


def provide_tables(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a stock vision model: hands it the tables that it would compute from ``grid_thw``."""
    grid = args[1] if len(args) > 1 else kwargs.get("grid_thw")
    if torch.compiler.is_compiling() or not isinstance(grid, Tensor) or any(name in kwargs for name in _NAMES):
        return None
    sizes, merge = tuple(map(tuple, grid.tolist())), model.spatial_merge_size
    if any(len(size) != 3 or min(size) < 1 or size[1] % merge or size[2] % merge for size in sizes):
        return None  # stock code says what is wrong
    key = (sizes, grid.device, model.num_grid_per_side, merge, model.config._attn_implementation)
    kept = _kept.setdefault(model, OrderedDict())
    if key not in kept:
        with torch.inference_mode(False):  # training may use them later
            kept[key] = _tables(model, torch.tensor(sizes, dtype=torch.int64), grid.device)
        while len(kept) > KEPT or len(kept) > 1 and sum(len(tables["position_ids"]) for tables in kept.values()) > KEPT_PATCHES:
            kept.popitem(last=False)
    kept.move_to_end(key)
    tables = kept[key]
    if is_plain(model.pos_embed, Embedding):  # which interpolates by itself
        tables = tables | {"interp_weights": tables["interp_indices"].unit_weights}
    return args, kwargs | tables


def _tables(model: nn.Module, grid: Tensor, device: torch.device) -> dict:
    """Computed on the CPU and moved over whole: a GPU would be launched dozens of times for a few kilobytes."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, num_grid_per_side=model.num_grid_per_side, mode=model.interpolation_mode, align_corners=model.interpolation_align_corners,
        spatial_merge_size=model.config.spatial_merge_size,
    )  # fmt: skip
    cu_seqlens, max_seqlen = get_vision_attention_seqlens(grid, model.config)
    positions, indices, weights = _positions(grid, model.spatial_merge_size).to(device), indices.to(device), weights.to(device)
    positions.rotary_tables = {}  # see Qwen3VLVisionRotaryEmbedding
    indices.interpolation_weights, indices.interpolated = weights, {}  # see Embedding
    indices.unit_weights = torch.ones(len(indices), 1, dtype=model.pos_embed.weight.dtype, device=device)
    # cu_seqlens stays on the CPU for CPU kernels, which check it there, and goes to the GPU once for those that read it there.
    tables = {"position_ids": positions, "interp_indices": indices, "interp_weights": weights, "cu_seqlens": cu_seqlens.to(device)}
    return tables | ({} if max_seqlen is None else {"max_seqlen": max_seqlen})


def _positions(grid: Tensor, merge: int) -> Tensor:
    """(row, column) [N, 2] of every patch of images ``grid`` [images, 3], in the order in which merge x merge blocks follow."""
    counts = grid.prod(1)
    image = torch.repeat_interleave(torch.arange(len(grid)), counts)
    first = (counts.cumsum(0) - counts)[image]
    height, width = grid[image, 1], grid[image, 2]
    within = (torch.arange(int(counts.sum())) - first) % (height * width)
    block, inner = within // merge**2, within % merge**2
    blocks_wide = width // merge
    return torch.stack((block // blocks_wide * merge + inner // merge, block % blocks_wide * merge + inner % merge), 1)


class Qwen3VLVisionRotaryEmbedding(stock.Qwen3VLVisionRotaryEmbedding):
    """Keeps cos and sin with the position ids that they belong to."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        kept = getattr(position_ids, "rotary_tables", None)
        if kept is None or self.inv_freq.is_inference():  # which tell no versions
            return super().forward(x, position_ids)
        key = (x.device, *_identity(self.inv_freq), self.attention_scaling)
        if key not in kept:
            kept.clear()
            with torch.inference_mode(False):
                kept[key] = *super().forward(x, position_ids), self.inv_freq.detach()
        return kept[key][:2]


def _identity(x: Tensor) -> tuple:
    """Equal for two looks at a tensor only if nothing was written in between; who keeps it keeps ``x.detach()`` too, or memory
    freed and used again for other values could look the same."""
    return x.data_ptr(), x._version, x.dtype, x.shape


class Embedding(nn.Embedding):
    """The learned position table. Of indices from ``provide_tables`` it gives the interpolated rows [N, 1, C] at once, and keeps
    them with the indices while the table does not change."""

    def forward(self, input: Tensor) -> Tensor:
        weights = getattr(input, "interpolation_weights", None)
        if weights is None:
            return super().forward(input)
        if len(input) > KEPT_ROWS or self.weight.is_inference() or self.weight.requires_grad and torch.is_grad_enabled():
            return self._interpolated(input, weights)
        kept, key = input.interpolated, _identity(self.weight)
        if key not in kept:
            kept.clear()
            with torch.inference_mode(False), torch.no_grad():
                kept[key] = self._interpolated(input, weights).to(self.weight.dtype), self.weight.detach()
        return kept[key][0]

    def _interpolated(self, indices: Tensor, weights: Tensor) -> Tensor:
        return (super().forward(indices) * weights[:, :, None]).sum(1, keepdim=True)
