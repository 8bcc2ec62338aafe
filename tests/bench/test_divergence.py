"""KL divergence, perplexity and agreement with their standard errors, against independent formulas."""

import math
import random

import models
import pytest
import torch

import qvl_model
from bench import accuracy, text
from bench.divergence import Divergence, text_logits, windows
from qvl_model import digits


def _samples(count=12, vocabulary=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [5 + 3 * (i % 4) for i in range(count)]
    dense = [torch.randn(n, vocabulary, generator=generator) for n in lengths]
    other = [x + 0.3 * torch.randn(x.shape, generator=generator) for x in dense]
    return dense, other, [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]


def _divergence(*samples):
    result = Divergence()
    for one in zip(*samples):
        result.add(*one)
    return result


def test_values_are_those_of_torchs_own_functions():
    dense, other, targets = _samples()
    found = _divergence(dense, other, targets).estimates()
    p, q, y = torch.cat(dense).double(), torch.cat(other).double(), torch.cat(targets)
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    loss, loss_dense = (torch.nn.functional.cross_entropy(logits, y).item() for logits in (q, p))
    assert found["kl_mean"].value == pytest.approx(kl.mean().item(), rel=1e-9)
    ordered = kl.sort().values  # linear between the two neighbours, as numpy's default
    place = 0.99 * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    assert found["kl_p99"].value == pytest.approx((low + (place % 1) * (high - low)).item(), rel=1e-9)
    assert found["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-9)
    assert found["perplexity_dense"].value == pytest.approx(math.exp(loss_dense), rel=1e-9)
    assert found["perplexity_ratio"].value == pytest.approx(math.exp(loss - loss_dense), rel=1e-9)
    assert found["top1_agreement"].value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_the_same_logits_have_no_divergence():
    dense, _, targets = _samples()
    dense[0][0, 0] = -math.inf  # a token that cannot come
    targets[0][0] = 1
    found = _divergence(dense, dense, targets).estimates()
    assert found["kl_mean"].value == found["kl_p99"].value == found["kl_mean"].error == 0
    assert found["top1_agreement"].value == found["perplexity_ratio"].value == 1


def test_error_is_the_spread_over_sequences():
    """All tokens of a sequence are alike here, so twice the tokens tell nothing more; equal lengths make the error the
    textbook s / sqrt(n).
    """
    numbers = random.Random(0)
    values = [numbers.gauss(2, 1) for _ in range(40)]
    errors = []
    for length in (4, 8):
        result = Divergence(
            tokens=[length] * 40,
            loss=[length * x for x in values],
            loss_dense=[0.0] * 40,
            agree=[length] * 40,
            kl=[torch.full((length,), x, dtype=torch.float64) for x in values],
        )
        found = result.estimates()
        mean = sum(values) / 40
        expected = math.sqrt(sum((x - mean) ** 2 for x in values) / 39 / 40)
        assert found["kl_mean"].error == pytest.approx(expected, rel=1e-9)
        assert found["perplexity"].error == pytest.approx(math.exp(mean) * expected, rel=1e-9)
        errors.append((found["kl_mean"].error, found["kl_p99"].error))
    assert errors[0][0] == pytest.approx(errors[1][0])
    assert errors[0][1] == pytest.approx(errors[1][1], rel=0.5) and errors[0][1] > 0


def test_error_with_unequal_lengths_is_that_of_the_jackknife():
    found = _divergence(*_samples(60)).estimates()["kl_mean"]
    samples = list(zip(*_samples(60)))
    left = [
        _divergence(*zip(*(samples[:i] + samples[i + 1 :]))).estimates()["kl_mean"].value for i in range(len(samples))
    ]
    mean = sum(left) / len(left)
    jackknife = math.sqrt((len(left) - 1) / len(left) * sum((x - mean) ** 2 for x in left))
    assert found.error == pytest.approx(jackknife, rel=0.1)


def test_one_sequence_has_no_error():
    assert all(math.isnan(one.error) for one in _divergence(*_samples(1)).estimates().values())


def test_windows_cover_the_text_once():
    pieces = windows(list(range(21)), 5)
    assert [piece.tolist()[0] for piece in pieces] == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]  # 1 token is left
    with pytest.raises(ValueError, match="length must be at least 2"):
        windows([1, 2, 3], 1)
    with pytest.raises(ValueError, match=r"takes logits \[T, V\]"):
        Divergence().add(torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))


def test_quantised_models_diverge_more_than_dense_ones():
    stock = models.stock_model("small")
    sequences = [models.inputs([20], seed=i)["input_ids"] for i in range(3)]
    dense = [text_logits(stock, ids) for ids in sequences]
    found = {}
    for weights in (None, "int8", "int4"):
        ours = qvl_model.accelerate(models.stock_model("small"), weights=weights)
        result = Divergence()
        for ids, expected in zip(sequences, dense):
            result.add(expected, text_logits(ours, ids), ids[0, 1:])
        found[weights] = result.estimates()["kl_mean"].value
    assert 0 <= found[None] < 1e-6 < found["int8"] < found["int4"]


@pytest.mark.parametrize("model", digits.SHIPPED)
def test_command_on_a_text(model, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("Read the digits from left to right. What is the largest digit? " * 12)
    assert accuracy.main(["--model", model, "--text", str(file), "--window", "32", "--limit", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert "in 3 sequences" in lines[0] and [row.split(" | ")[0][2:] for row in rows[2:]] == list(text.PRECISIONS)
    file.write_text("")
    assert accuracy.main(["--model", model, "--text", str(file)]) == 2
    assert "at least 2 are needed" in capsys.readouterr().err


def test_a_language_model_of_another_kind(tmp_path):
    """Its linear layers are quantised one by one; the head stays."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qvl_model.quantization.modules import PackedLinear

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    model = text.with_weights(text.load(tmp_path), weights="int4")
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 14
    assert type(model.lm_head) is torch.nn.Linear
    assert text_logits(model, torch.arange(10)[None]).shape == (9, 50)
