"""Calibration on the trained models, with outliers as real models have them, on questions that it has not seen."""

import functools
import json
import re

import numpy as np
import outliers
import pytest
import torch
from transformers import AutoModelForImageTextToText

import qvl_model
from bench import accuracy
from bench.divergence import Divergence
from qvl_model import cli, digits
from qvl_model.digits import scenes
from qvl_model.processing import load_processor

QUESTIONS = 256


def _stock(name):
    return AutoModelForImageTextToText.from_pretrained(digits.SHIPPED[name], dtype=torch.bfloat16).eval()


@functools.cache
def _batches(name):
    items = [accuracy.Item([q.image], q.question, q.answer) for q in scenes.held_out_questions(QUESTIONS)]
    return list(accuracy._batches(load_processor(digits.SHIPPED[name]), items, with_answers=True))


def _answers(model, name):
    """Logits and targets of the answer of each question."""
    found = []
    with torch.inference_mode():
        for _, inputs, lengths in _batches(name):
            logits = model(**inputs).logits
            for row, length in enumerate(lengths.tolist()):
                found.append((logits[row, -length - 1 : -1], inputs["input_ids"][row, -length:]))
    return found


def _measure(model, name, dense):
    """(KL to the dense model, for each answer whether all its tokens are the most likely)"""
    divergence, right = Divergence(), []
    for (expected, targets), (logits, _) in zip(dense, _answers(model, name)):
        divergence.add(expected, logits, targets)
        right.append(_right(logits, targets))
    return divergence.estimates()["kl_mean"], right


def _right(logits, targets):
    return bool((logits.argmax(-1) == targets).all())


def _lost(before, after):
    """How much smaller the share of right answers is, less two standard errors of the difference."""
    changes = [a - b for a, b in zip(before, after)]
    mean = sum(changes) / len(changes)
    return mean - 2 * (sum((change - mean) ** 2 for change in changes) ** 0.5 / len(changes))


@pytest.mark.parametrize("name", digits.SHIPPED)
def test_outliers_cost_nothing_after_calibration(name):
    dense = _answers(_stock(name), name)
    exact = [_right(logits, targets) for logits, targets in dense]
    print(f"\n{name}: dense {sum(exact) / len(exact):.2%}")
    for weights, points in (("int8", 0.003), ("int4", 0.01)):
        plain = _measure(qvl_model.accelerate(_stock(name), weights=weights), name, dense)
        hard = _measure(qvl_model.accelerate(outliers.inject(_stock(name)), weights=weights), name, dense)
        own, general = (
            _measure(
                qvl_model.accelerate(outliers.inject(_stock(name)), weights=weights, calibration=inputs), name, dense
            )
            for inputs in (_own(name), "default")
        )
        for label, (kl, right) in zip(
            ("without outliers", "with outliers", "calibrated", "calibrated on the default set"),
            (plain, hard, own, general),
        ):
            print(f"{name} {weights} {label}: KL {kl}, exact {sum(right) / len(right):.2%}")
        for kl, right in (own, general):
            assert kl.value - 2 * kl.error <= 1.2 * plain[0].value < hard[0].value / 5
            assert _lost(exact, right) <= points


def _own(name):
    """Training questions; none of their digits is in a held-out one."""
    processor, found = load_processor(digits.SHIPPED[name]), []
    random = np.random.default_rng(5)
    for question in (scenes.make_question("train", random) for _ in range(16)):
        content = [{"type": "image"}, {"type": "text", "text": question.question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        found.append(processor(images=[question.image], text=[prompt + question.answer], return_tensors="pt"))
    return found


@pytest.mark.parametrize("own", [False, True])
def test_command(own, tmp_path, capsys):
    source, options = str(digits.SHIPPED["digits"]), []
    if own:
        scenes.held_out_questions(1)[0].image.save(tmp_path / "scene.png")
        rows = [{"text": "Read the digits."}, {"image": "scene.png", "question": "Which digit is this?"}]
        (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options = [str(tmp_path / "set.jsonl")]
    arguments = ["quantize", "--model", source, "--weights", "int4", "--bits", "5", "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--calibrate", *options]) == 0
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["calibration"]["set"] == ("own" if own else "default")
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    found = re.search(r"bits per weight: ([\d.]+) on average", capsys.readouterr().out)
    assert 4.3 < float(found[1]) <= 5.3  # scales of short rows are a larger part than in real models
    for text, message in (("{}", "line 1 is neither text nor image"), ("", "holds no inputs")):
        (tmp_path / "bad.jsonl").write_text(text)
        arguments[-1] = str(tmp_path / "other")
        assert cli.main([*arguments, "--calibrate", str(tmp_path / "bad.jsonl")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()
