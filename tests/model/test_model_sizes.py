"""The larger published models, at reduced depth and vocabulary: their widths, heads and untied heads."""

import copy

import pytest
import torch
from models import PATCH, inputs
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

import qvl_model
from qvl_model import checkpoint_files
from qvl_model.capacity.spec import qwen3_vl

SIZES = ["4b", pytest.param("8b", marks=pytest.mark.slow), pytest.param("32b", marks=pytest.mark.slow)]


def _model(size):
    """One layer and one block of the published widths."""
    config = qwen3_vl(size)
    config.text_config.update({"num_hidden_layers": 1, "vocab_size": 160})
    config.vision_config.update({"depth": 1, "deepstack_visual_indexes": [0], "patch_size": PATCH})
    config.update(
        {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_().div_(parameter[0].numel() ** 0.5)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_stocks(size):
    stock = _model(size)
    batch = inputs([5, (1, 4, 6), 3], [14])
    visible = batch["attention_mask"].bool()
    with torch.no_grad():
        theirs = stock(**batch).logits[visible].double()
        exact = copy.deepcopy(stock).double()
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
        truth = exact(**wide).logits[visible]
        del exact
        model = qvl_model.accelerate(stock)
        ours = model(**batch).logits[visible].double()
    errors = [((logits - truth).norm() / truth.norm()).item() for logits in (ours, theirs)]
    assert errors[0] <= 1.1 * errors[1] and errors[1] < 0.05
    report = qvl_model.report(model)
    assert report.accelerated and "own loop" not in report.decoding
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[1] == visible.shape[1] + 3


def test_mixtures_of_experts_are_refused(tmp_path):
    config = Qwen3VLMoeConfig(
        text_config=dict(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=2,
            moe_intermediate_size=16,
            vocab_size=160,
        ),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, deepstack_visual_indexes=[0]
        ),
    )
    model = Qwen3VLMoeForConditionalGeneration(config)
    with pytest.raises(TypeError, match="got Qwen3VLMoeForConditionalGeneration"):
        qvl_model.accelerate(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a qwen3_vl_moe model; qvl runs qwen3_vl and qvl"):
        checkpoint_files.load_config(tmp_path)
