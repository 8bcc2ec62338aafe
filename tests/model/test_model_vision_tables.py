"""Position indices and cos/sin caches of the vision tower: stock's values, made once per set of image sizes."""

import copy
import pickle

import models
import pytest
import torch
from models import assert_close
from transformers.vision_utils import get_vision_position_ids

import qvl_model
from qvl_model.modules import vision, vision_tables

GRIDS = [[(1, 2, 2)], [(1, 4, 6), (3, 8, 2), (1, 34, 18)], [(5, 2, 4)] * 7]


@pytest.mark.parametrize("sizes", GRIDS, ids=str)
def test_positions_equal_stock(sizes):
    grid = torch.tensor(sizes)
    assert torch.equal(vision_tables._positions(grid, 2), get_vision_position_ids(grid, 2))
    assert torch.equal(vision_tables._positions(grid, 1), get_vision_position_ids(grid, 1))


def _pixels(sizes):
    patches = sum(t * h * w for t, h, w in sizes)
    return torch.randn(patches, 3 * models.TEMPORAL * models.PATCH**2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sizes", GRIDS, ids=str)
def test_vision_tower_equals_stock(sizes):
    stock, fast = (model.model.visual for model in models.pair())
    grid, pixels = torch.tensor(sizes), _pixels(sizes)
    with torch.inference_mode():  # inference tensors, which training cannot use
        for _ in range(2):
            assert_close(fast(pixels, grid_thw=grid).pooler_output, stock(pixels, grid).pooler_output)
    losses = [model(pixels, grid_thw=grid).pooler_output.square().mean() for model in (stock, fast)]
    assert_close(losses[1], losses[0])
    losses[1].backward()
    assert fast.pos_embed.weight.grad is not None


def test_made_once_and_forgotten_in_order(monkeypatch):
    visual = models.pair()[1].model.visual
    made, original = [], vision_tables._tables
    monkeypatch.setattr(vision_tables, "_tables", lambda *args: made.append(1) or original(*args))
    with torch.no_grad():
        for _ in range(3):
            visual(_pixels([(1, 4, 4)]), grid_thw=torch.tensor([(1, 4, 4)]))
        assert len(made) == 1
        for height in range(vision_tables.KEPT + 3):
            visual(_pixels([(1, 2 * height + 2, 2)]), grid_thw=torch.tensor([(1, 2 * height + 2, 2)]))
    assert len(vision_tables._kept[visual]) == vision_tables.KEPT


def test_tables_given_by_the_caller_are_used():
    visual = models.pair()[1].model.visual
    sizes = [(1, 4, 4)]
    with torch.no_grad():
        plain = visual(_pixels(sizes), grid_thw=torch.tensor(sizes)).pooler_output
        moved = visual(_pixels(sizes), grid_thw=torch.tensor(sizes), position_ids=torch.full((16, 2), 3)).pooler_output
    assert models.relative(moved, plain) > 1e-3


def test_sizes_that_do_not_merge_are_refused_as_by_stock():
    for model in models.pair():
        with pytest.raises(RuntimeError, match="shape"):
            model.model.visual(_pixels([(1, 3, 4)]), grid_thw=torch.tensor([(1, 3, 4)]))


def test_hooks_come_once_travel_and_go():
    model = qvl_model.accelerate(models.pair()[1])
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(copied.model.visual._forward_pre_hooks.values()) == [
            vision_tables.provide_tables,
            vision.return_freed_memory,
        ]
        assert list(copied.model.visual._forward_hooks.values()) == [vision.return_freed_memory]
        visual = qvl_model.restore(copied).model.visual
        assert not visual._forward_pre_hooks and not visual._forward_pre_hooks_with_kwargs and not visual._forward_hooks


def test_memory_goes_back_after_large_images_only(monkeypatch):
    visual, trimmed = models.pair()[1].model.visual, []
    monkeypatch.setattr(vision.pages, "return_freed_memory", lambda: trimmed.append(1))
    with torch.no_grad():
        for size, expected in (((1, 62, 66), 0), ((1, 64, 64), 2)):
            visual(_pixels([size]), grid_thw=torch.tensor([size]))
            assert len(trimmed) == expected


def _shift(module, args):
    """Writes into every index table, past version counters."""
    for table in args:
        if not table.is_floating_point():
            table.data.clamp_(max=1)


def test_what_hooks_write_into_tables_stays_in_that_call():
    stock, fast = (model.model.visual for model in models.pair())
    grid, pixels = torch.tensor([(1, 4, 6)]), _pixels([(1, 4, 6)])
    with torch.no_grad():
        plain = stock(pixels, grid_thw=grid).pooler_output
        results = []
        for model in (stock, fast):
            handles = [
                model.rotary_pos_emb.register_forward_pre_hook(_shift),
                model.pos_embed.register_forward_pre_hook(_shift),
            ]
            results.append(model(pixels, grid_thw=grid).pooler_output)
            for handle in handles:
                handle.remove()
        assert_close(results[1], results[0])
        assert models.relative(results[0], plain) > 1e-3
        assert_close(fast(pixels, grid_thw=grid).pooler_output, plain)
