"""The digits scenes, the processors and the checkpoints that ship."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from bench import accuracy
from qvl_model import capacity, cli, digits
from qvl_model.digits import scenes, train
from qvl_model.digits.export import write_rows
from qvl_model.digits.families import FAMILIES
from qvl_model.processing import load_processor


def test_held_out_questions_are_deterministic():
    first, again = scenes.held_out_questions(20), scenes.held_out_questions(20)
    assert [(q.question, q.answer) for q in first] == [(q.question, q.answer) for q in again]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again))


def test_splits_share_no_source_digit():
    train_scans, train_labels = scenes.source_digits("train")
    held_scans, held_labels = scenes.source_digits("held_out")
    assert len(train_scans) + len(held_scans) == 1797 and len(held_scans) == 359
    assert set(held_labels) == set(train_labels) == set(range(10))
    seen = {scan.tobytes() for scan in train_scans}
    assert sum(scan.tobytes() in seen for scan in held_scans) == 0


def test_questions_and_answers_fit():
    for question in scenes.held_out_questions(200):
        values = [int(part) for part in question.answer.split()]
        assert scenes.QUESTIONS[question.kind] == question.question
        assert question.image.size == (96, 32)
        assert all(0 <= value <= 9 for value in values)
        assert len(values) == 1 or (question.kind == "read" and len(values) <= 3)


FAMILY_OF = {"digits": "qwen3-vl", "qvl-tiny": "qvl"}
assert FAMILY_OF.keys() == digits.SHIPPED.keys()


@pytest.mark.parametrize("model", FAMILY_OF)
def test_training_sees_what_the_processor_makes(model):
    """Text and pixels of a training row equal those of the saved processor."""
    processor, family = load_processor(digits.checkpoint(model)), FAMILIES[FAMILY_OF[model]]
    for question in scenes.held_out_questions(5):
        content = [{"type": "image"}, {"type": "text", "text": question.question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        expected = processor(images=[question.image], text=[prompt], return_tensors="pt")
        ids = torch.tensor(train.chat_ids(processor.tokenizer, question.question, question.answer, family.places)[0])
        assert torch.equal(ids, expected["input_ids"][0])
        row = family.image(np.asarray(question.image), ids == processor.image_token_id)
        assert (ids == processor.image_token_id).sum() == family.places
        assert torch.equal(row.pop("pixel_values").squeeze(), expected["pixel_values"].squeeze())
        assert all(torch.equal(value.squeeze(), expected[name].squeeze()) for name, value in row.items())
        assert expected.get("pixel_attention_mask", torch.ones(1)).all()


def test_processor_round_trip():
    processor = load_processor(digits.CHECKPOINT)
    text = "Qwen, 42 °C, 中文 & emoji 🙂"
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_processor_reads_the_template_of_older_checkpoints(tmp_path):
    directory = shutil.copytree(digits.CHECKPOINT, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    template = directory / "chat_template.jinja"
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    expected = template.read_text()
    template.unlink()
    assert load_processor(directory).chat_template == expected


def test_processor_refuses_videos():
    with pytest.raises(ValueError, match="torchvision"):
        load_processor(digits.CHECKPOINT)(videos=[object()], text=["x"])


@pytest.mark.parametrize("name", digits.SHIPPED)
def test_checkpoint_is_small_whole_and_in_bf16(name):
    size = sum(file.stat().st_size for file in digits.SHIPPED[name].iterdir())
    assert size <= 12e6
    model = AutoModelForImageTextToText.from_pretrained(digits.SHIPPED[name], dtype="auto")
    assert isinstance(model, FAMILIES[FAMILY_OF[name]].model) and all(
        p.dtype == torch.bfloat16 for p in model.parameters()
    )
    capacity.verify(model)


def test_names_of_models_that_ship(tmp_path, monkeypatch, capsys):
    assert digits.checkpoint() == digits.CHECKPOINT == digits.checkpoint("digits")
    assert digits.checkpoint("qvl-tiny") == digits.SHIPPED["qvl-tiny"] and digits.checkpoint("/no/such") == Path(
        "/no/such"
    )
    assert cli.main(["verify", "qvl-tiny"]) == 0 and "QVLCrossAttention" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qvl-tiny").mkdir()  # no checkpoint: a folder of data, for example
    assert digits.checkpoint("qvl-tiny") == digits.SHIPPED["qvl-tiny"]
    (tmp_path / "qvl-tiny" / "config.json").write_text("{}")
    assert digits.checkpoint("qvl-tiny") == Path("qvl-tiny")


@pytest.mark.parametrize("model", digits.SHIPPED)
def test_checkpoint_answers_held_out_questions(model):
    result = accuracy.run(model, limit=200)
    bf16 = result["precisions"]["bf16"]
    assert bf16["exact_stock"] >= 0.9 and bf16["exact_ours"] >= 0.9
    assert result["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("model", digits.SHIPPED)
def test_checkpoint_reaches_95_percent_on_2000_questions(model):
    result = accuracy.run(model)
    assert result["questions"] == 2000 and result["passed"]
    for metrics in result["precisions"].values():
        assert metrics["exact_ours"] >= 0.95 and abs(metrics["exact_ours"] - metrics["exact_stock"]) <= 0.001


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss(family, tmp_path):
    # 100 steps: half of the warm-up. After 40 the learning rate is too small for the bound below.
    train.main(["--family", family, "--out", str(tmp_path / "model"), "--steps", "100", "--batch", "16"])
    assert load_processor(tmp_path / "model") is not None
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    fresh = AutoModelForImageTextToText.from_config(model.config)
    processor = load_processor(tmp_path / "model")
    items = accuracy._digits_items(32)
    trained, untrained = (accuracy._evaluate(m.eval().float(), processor, items) for m in (model, fresh))
    assert trained["log_likelihood"] > 0.5 * untrained["log_likelihood"]


def test_long_reference_answers_are_not_cut():
    """Answers longer than 16 tokens are generated to their end."""
    asked = []

    class Spy(torch.nn.Module):
        def generate(self, input_ids, max_new_tokens, **inputs):
            asked.append(max_new_tokens)
            return input_ids

        def forward(self, input_ids, logits_to_keep, **inputs):
            return SimpleNamespace(logits=torch.zeros(*input_ids[:, -logits_to_keep:].shape, 384))

    question = scenes.held_out_questions(1)[0]
    processor = load_processor(digits.CHECKPOINT)
    answer = " ".join("3141592653589793238462643")
    accuracy._evaluate(Spy(), processor, [accuracy.Item([question.image], question.question, answer)])
    assert asked[0] > len(processor.tokenizer(answer).input_ids) > 16


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_without_questions_is_refused(limit):
    with pytest.raises(ValueError, match="at least 1"):
        accuracy.run(limit=limit)


def test_questions_from_a_file(tmp_path):
    question = scenes.held_out_questions(1)[0]
    question.image.save(tmp_path / "a.png")
    file = tmp_path / "questions.jsonl"
    file.write_text(
        '{"image": "a.png", "question": "Which?", "answer": "3"}\n\n{"image": ["a.png"], "question": "Q", "answer": '
        "4}\n"
    )
    items = accuracy.load_questions(file)
    assert [item.answer for item in items] == ["3", "4"] and items[0].images[0].size == (96, 32)
    file.write_text(
        '{"image": "a.png", "question": "Which?", "answer": "3"}\n{"image": "b.png", "question": "Q", "answer": "4"}\n'
    )
    with pytest.raises(ValueError, match="line 2"):
        accuracy.load_questions(file)


@pytest.mark.slow
def test_qvl_tiny_can_be_trained_again(tmp_path):
    """The whole training of the model that ships, in 25 minutes on two quiet cores at most (CPU time: they may not be
    quiet).
    """
    start = time.process_time()
    train.main(["--family", "qvl", "--out", str(tmp_path / "qvl-tiny")])
    assert time.process_time() - start <= 2 * 25 * 60
    questions = write_rows(tmp_path / "questions.jsonl", "held_out", 2000, seed=1)
    result = accuracy.run(str(tmp_path / "qvl-tiny"), str(questions))
    precisions = result["precisions"]
    assert result["questions"] == 2000 and all(metrics["exact_ours"] >= 0.9 for metrics in precisions.values())
    assert all(metrics["passed"] for name, metrics in precisions.items() if name != "bf16"), result["rows"]
    # The weights depend on the machine, and bf16 decides ties of theirs: stock's own answers in bf16 differ from those
    # in fp32 in 4 of 2,000.
    bf16 = precisions["bf16"]
    assert bf16["agreement"] >= 0.995 and bf16["exact_ours"] >= bf16["exact_stock"] - 0.005, result["rows"]
    assert bf16["perplexity_ratio"] <= accuracy.PRECISIONS["bf16"].perplexity_ratio
