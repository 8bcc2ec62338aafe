"""generate and forward equal stock's, and every layer of every forward is one fused call."""

import pytest
import torch
from models import assert_all_fused, assert_close, fused_calls, inputs, pair
from transformers import DynamicCache, StaticCache

from qvl_model.compat import CACHE

SMALL, LARGE = (1, 2, 2), (1, 34, 18)
PROMPTS = {
    "text": [[9]],
    "one token": [[1]],
    "smallest image": [[3, SMALL, 4]],
    "largest image": [[2, LARGE, 3]],
    "image at both ends": [[(1, 4, 6), 3, (1, 6, 4)]],
    "images of several sizes": [[2, (1, 4, 6), 3, SMALL, (1, 10, 2), 4]],
    "video": [[3, (3, 4, 6), 4]],
    "image and video": [[3, (1, 6, 4), 2, (2, 4, 4), 3]],
    "batch 2, images": [[3, (1, 4, 4), 5], [2, (1, 4, 4), 6]],
    "batch 3, left padding, text": [[9], [4], [7]],
    "batch 3, left padding, mixed": [[3, (1, 4, 6), 5], [4], [2, SMALL, 3, (1, 8, 4), 1]],
    "batch 8, left padding": [[n, (1, 2, 2 * n)] for n in range(1, 9)],
}
MODES = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=0.9, top_k=20, top_p=0.95),
    "beams": dict(do_sample=False, num_beams=3),
    "several sequences": dict(do_sample=True, num_return_sequences=2),
}


def _generate(model, batch, *, static: bool = False, new_tokens: int = 6, **options):
    torch.manual_seed(7)
    if static:
        length = batch["input_ids"].shape[1] + new_tokens
        options[CACHE] = StaticCache(config=model.config.text_config, max_cache_len=length)
    return model.generate(
        **batch, max_new_tokens=new_tokens, return_dict_in_generate=True, output_logits=True, **options
    )


def _assert_same(ours, theirs) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for our_logits, their_logits in zip(ours.logits, theirs.logits, strict=True):
        assert_close(our_logits, their_logits)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_generate(models, prompt, mode, static):
    stock, fast = models
    batch = inputs(*PROMPTS[prompt])
    expected = _generate(stock, batch, static=static, **MODES[mode])
    with fused_calls(fast) as calls:
        got = _generate(fast, batch, static=static, **MODES[mode])
    _assert_same(got, expected)
    assert_all_fused(calls, vision="image_grid_thw" in batch or "video_grid_thw" in batch)
    assert got[CACHE].get_seq_length() == expected[CACHE].get_seq_length()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_generate_in_16_bits_is_fused(dtype, static):
    _, fast = pair("odd", dtype)
    with fused_calls(fast) as calls:
        out = _generate(fast, inputs(*PROMPTS["batch 3, left padding, mixed"]), static=static)
    assert_all_fused(calls, vision=True)
    assert all(logits.isfinite().all() for logits in out.logits)


@pytest.mark.parametrize("rows", range(1, 9))
def test_every_batch_size(models, rows):
    stock, fast = models
    batch = inputs(*[[2 + row, (1, 2, 4), 3] for row in range(rows)])
    expected = _generate(stock, batch, new_tokens=4)
    with fused_calls(fast) as calls:
        got = _generate(fast, batch, new_tokens=4)
    _assert_same(got, expected)
    assert_all_fused(calls, vision=True)


def test_cache_implementation_static_by_name(models):
    stock, fast = models
    batch = inputs([3, (1, 4, 4), 5])
    options = dict(cache_implementation="static", disable_compile=True)
    expected = _generate(stock, batch, **options)
    with fused_calls(fast) as calls:
        _assert_same(_generate(fast, batch, **options), expected)
    assert_all_fused(calls, vision=True)


def test_use_cache_off(models):
    stock, fast = models
    batch = inputs([3, (1, 4, 4), 5])
    expected = _generate(stock, batch, use_cache=False)
    with fused_calls(fast) as calls:
        _assert_same(_generate(fast, batch, use_cache=False), expected)
    assert_all_fused(calls, vision=True)


def test_left_padded_rows_equal_rows_alone(models):
    _, fast = models
    rows = PROMPTS["batch 3, left padding, text"]
    together = inputs(*rows)
    with torch.inference_mode():
        logits = fast(**together).logits
    assert logits.isfinite().all()
    for row, length in enumerate(segments[0] for segments in rows):
        alone = together["input_ids"][row : row + 1, -length:]
        with torch.inference_mode():
            assert_close(logits[row : row + 1, -length:], fast(input_ids=alone).logits)


def test_text_and_vision_parts_alone_are_fused(models):
    stock, fast = models
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    batch = inputs([(1, 6, 4), 2])
    with fused_calls(fast) as calls, torch.no_grad():
        text = fast.model.language_model(input_ids=ids, **{CACHE: DynamicCache()}).last_hidden_state
        image = fast.model.visual(batch["pixel_values"], batch["image_grid_thw"])
    assert_all_fused(calls, vision=True)
    with torch.no_grad():
        assert_close(text, stock.model.language_model(input_ids=ids).last_hidden_state)
        expected = stock.model.visual(batch["pixel_values"], batch["image_grid_thw"])
    assert_close(image.pooler_output, expected.pooler_output)
    for ours, theirs in zip(image.deepstack_features, expected.deepstack_features, strict=True):
        assert_close(ours, theirs)
