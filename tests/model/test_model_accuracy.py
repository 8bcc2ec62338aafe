"""Errors of the accelerated model against the fp64 reference, beside stock's on the same input."""

import copy

import models
import pytest
import torch
from models import relative

ROWS = ([5, (1, 4, 6), 3], [14], [3, (1, 2, 2), (1, 8, 6)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["odd", "wide_head"])
def test_16_bit_error_is_no_worse_than_stocks(name, dtype):
    """Against fp64, on the same input: at most 1.1 times stock's error."""
    stock, fast = models.pair(name, dtype)
    exact, batch = copy.deepcopy(stock).double(), models.inputs(*ROWS)
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        golden, expected, got = (model(**batch).logits[seen] for model in (exact, stock, fast))
    assert relative(got, golden) <= 1.1 * relative(expected, golden)


@pytest.mark.parametrize("name", models.CONFIGS)
def test_fp32_greedy_tokens_are_stocks(name):
    """64 tokens, equal as long as the margin of stock's two best logits exceeds ten times the error against fp64."""
    stock, fast = models.pair(name)
    batch = models.inputs([5, (1, 2, 2), 3, (1, 34, 18), 4])
    exact = copy.deepcopy(stock).double()
    with torch.no_grad():
        error = (fast(**batch).logits - exact(**batch).logits).abs().max().item()
    options = {"max_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected, got = stock.generate(**batch, **options), fast.generate(**batch, **options)
    compared = 0
    for step, logits in enumerate(expected.logits):
        best, second = logits[0].topk(2).values
        if best - second <= 10 * error:
            break
        position = batch["input_ids"].shape[1] + step
        assert got.sequences[0, position] == expected.sequences[0, position], f"token {step}"
        compared += 1
    assert compared >= 8
