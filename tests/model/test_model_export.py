"""transformers' exporter on accelerated models: image encoder, prefill and decode step with static shapes."""

import copy
import sys

import pytest
import torch
from models import assert_close, inputs, pair
from packaging.version import Version
from transformers import DynamicCache
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from qvl_model import replacements
from qvl_model.compat import CACHE

BATCH = inputs([5, (1, 4, 4), 3])


def _image(model):
    visual = model.model.visual
    return visual, {"hidden_states": BATCH["pixel_values"], "grid_thw": BATCH["image_grid_thw"]}


def _prompt(model):
    ids = {name: BATCH[name] for name in ("input_ids", "mm_token_type_ids", "attention_mask", "image_grid_thw")}
    return model, {**BATCH, "position_ids": model.model.get_rope_index(**ids)[0]}


def _decode(model):
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]), **{CACHE: cache})
    positions = torch.full((3, 1, 1), 3)
    return model, {
        "input_ids": torch.tensor([[7]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        CACHE: cache,
        "position_ids": positions,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [_image, _prompt, _decode])
def test_exported_programs_give_what_stocks_do(make):
    exporter = pytest.importorskip("transformers.exporters.exporter_dynamo")
    if Version(torch.__version__) < Version(exporter.DynamoExporter.min_versions["torch"]):
        pytest.skip(f"transformers' exporter needs PyTorch {exporter.DynamoExporter.min_versions['torch']}")
    from transformers.exporters.utils import prepare_for_export

    results = []
    for model in pair("small"):
        module, given = make(model)
        with torch.no_grad():
            eager = module(**copy.deepcopy(given))
        program = exporter.DynamoExporter().export(
            module, copy.deepcopy(given), config=exporter.DynamoConfig(dynamic=False)
        )
        _, prepared, _ = prepare_for_export(module, copy.deepcopy(given))
        out = (program.module() if hasattr(program, "module") else program)(**prepared)
        results += [
            out["pooler_output" if make is _image else "logits"],
            eager["pooler_output" if make is _image else "logits"],
        ]
    for result in results[1:]:
        assert_close(result, results[0])


def test_the_module_of_a_class_shows_what_that_of_its_stock_class_does():
    for theirs, ours in replacements.REPLACEMENTS.items():
        if theirs.__module__ == stock.__name__:
            module = sys.modules[ours.__module__]
            assert module.apply_rotary_pos_emb_vision is stock.apply_rotary_pos_emb_vision
            assert module.eager_attention_forward is stock.eager_attention_forward
            with pytest.raises(AttributeError):
                _ = module.no_such_name
