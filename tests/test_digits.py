"""The digits scenes, the processor and the checkpoint that ships."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from bench import accuracy
from qvl_model import digits
from qvl_model.digits import scenes, train
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


def test_patchify_is_the_image_processor():
    questions = scenes.held_out_questions(5)
    expected = train.build_image_processor()([q.image for q in questions], return_tensors="pt")
    ours = train.patchify(np.stack([np.asarray(q.image) for q in questions]))
    assert torch.equal(ours, expected["pixel_values"])


def test_processor_round_trip():
    processor = load_processor(digits.CHECKPOINT)
    question = scenes.held_out_questions(1)[0]
    content = [{"type": "image"}, {"type": "text", "text": question.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    inputs = processor(images=[question.image], text=[prompt], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 6]]
    assert int(inputs["mm_token_type_ids"].sum()) == train.VISUAL_TOKENS
    expected, _ = train.chat_ids(processor.tokenizer, question.question, question.answer)
    assert inputs["input_ids"][0].tolist() == expected
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


def test_checkpoint_is_small_and_in_bf16():
    size = sum(file.stat().st_size for file in digits.CHECKPOINT.iterdir())
    assert size <= 12e6
    model = Qwen3VLForConditionalGeneration.from_pretrained(digits.CHECKPOINT, dtype="auto")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_checkpoint_answers_held_out_questions():
    result = accuracy.run(limit=200)
    bf16 = result["precisions"]["bf16"]
    assert bf16["exact_stock"] >= 0.9 and bf16["exact_ours"] >= 0.9
    assert result["passed"]


@pytest.mark.slow
def test_checkpoint_reaches_95_percent_on_2000_questions():
    result = accuracy.run()
    assert result["questions"] == 2000 and result["passed"]
    assert all(m["exact_ours"] >= 0.95 for m in result["precisions"].values())


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path, capsys):
    # 100 steps: half of the warm-up. After 40 the learning rate is still so small that the bound below was missed.
    train.main(["--out", str(tmp_path / "model"), "--steps", "100", "--batch", "16"])
    assert load_processor(tmp_path / "model") is not None
    model = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "model")
    fresh = Qwen3VLForConditionalGeneration(model.config)
    processor = load_processor(tmp_path / "model")
    items = accuracy._digits_items(32)
    trained, untrained = (accuracy._evaluate(m.eval().float(), processor, items) for m in (model, fresh))
    assert trained["log_likelihood"] > 0.5 * untrained["log_likelihood"]


def test_long_reference_answers_are_not_cut():
    """Generation once stopped after 16 tokens, so that no longer answer could be exact."""
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
    file.write_text('{"image": "a.png", "question": "Which?", "answer": "3"}\n\n{"image": ["a.png"], "question": "Q", "answer": 4}\n')
    items = accuracy.load_questions(file)
    assert [item.answer for item in items] == ["3", "4"] and items[0].images[0].size == (96, 32)
    file.write_text('{"image": "a.png", "question": "Which?", "answer": "3"}\n{"image": "b.png", "question": "Q", "answer": "4"}\n')
    with pytest.raises(ValueError, match="line 2"):
        accuracy.load_questions(file)
