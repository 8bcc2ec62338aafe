"""Rows of training data: formats, refusals and their reports, labels, batches."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import write_rows

from qvl_model import digits, training
from qvl_model.digits import scenes, train
from qvl_model.digits.families import FAMILIES
from qvl_model.processing import load_processor

DIGITS = FAMILIES["qwen3-vl"]


@pytest.fixture(scope="module")
def processor():
    return load_processor(digits.CHECKPOINT)


@pytest.fixture
def images(tmp_path):
    for name in ("a", "b"):
        scenes.held_out_questions(1)[0].image.save(tmp_path / f"{name}.png")
    return tmp_path


def _write(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return file


def _rows(folder, processor, *rows, max_length=256, **options):
    return training.Rows(training.JsonlRows(_write(folder, *rows)), training.Encoder(processor, max_length), **options)


GOOD = {"image": "a.png", "question": "Which digit is this?", "answer": "7"}


def _learned(processor, row):
    """The text of each span of tokens with labels."""
    learned, texts = row["labels"] != -100, []
    start = None
    for i, on in enumerate([*learned.tolist(), False]):
        if on and start is None:
            start = i
        elif not on and start is not None:
            texts.append(processor.tokenizer.decode(row["input_ids"][start:i]))
            start = None
    assert torch.equal(row["labels"][learned], row["input_ids"][learned])
    return texts


def test_rows_are_what_the_digits_model_was_trained_on(processor):
    question = scenes.held_out_questions(1)[0]
    conversation = training.parse({"image": question.image, "question": question.question, "answer": question.answer})
    row = training.Encoder(processor)(conversation, [question.image])
    prompt, answer = train.chat_ids(processor.tokenizer, question.question, question.answer, DIGITS.places)
    assert row["input_ids"].tolist() == prompt + answer
    assert row["labels"].tolist() == [-100] * len(prompt) + answer
    assert torch.equal(
        row["pixel_values"],
        DIGITS.image(np.asarray(question.image), row["input_ids"] == processor.image_token_id)["pixel_values"],
    )
    assert row["image_grid_thw"].tolist() == [[1, 2, 6]] and int(row["mm_token_type_ids"].sum()) == 3


TURNS = [
    ("user", "<image>Which digit is this?"),
    ("assistant", "7"),
    ("user", "How many digits are there?"),
    ("assistant", "1"),
]
FORMS = {
    "messages": {"images": ["a.png"], "messages": [{"role": role, "content": text} for role, text in TURNS]},
    "conversations": {
        "image": "a.png",
        "conversations": [{"from": {"user": "human"}.get(role, "gpt"), "value": text} for role, text in TURNS],
    },
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": TURNS[0][1][7:]}],
            },
            *({"role": role, "content": [{"type": "text", "text": text}]} for role, text in TURNS[1:]),
        ]
    },
    "no place": {
        "image": "a.png",
        "messages": [{"role": role, "content": text.removeprefix("<image>")} for role, text in TURNS],
    },
    "last turn unanswered": {
        "image": "a.png",
        "messages": [*({"role": role, "content": text} for role, text in TURNS), {"role": "user", "content": "And?"}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_conversations(form, images, processor):
    rows = _rows(images, processor, FORMS[form])
    assert _learned(processor, rows[0]) == ["7<|im_end|>", "1<|im_end|>"]
    content = [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}]
    messages = [{"role": "user", "content": content}] + [{"role": role, "content": text} for role, text in TURNS[1:]]
    whole = processor.apply_chat_template(messages, tokenize=False).replace("<|image_pad|>", "<|image_pad|>" * 3)
    assert processor.tokenizer.decode(rows[0]["input_ids"]) == whole.rstrip("\n")


def test_two_images_keep_their_places(tmp_path, processor):
    for name, value in (("a", 0), ("b", 255)):
        Image.new("RGB", (96, 32), (value,) * 3).save(tmp_path / f"{name}.png")
    rows = _rows(tmp_path, processor, {"images": ["b.png", "a.png"], "question": "<image> or <image>?", "answer": "b"})
    row = rows[0]
    assert row["pixel_values"][:12].mean() > 0.99 and row["pixel_values"][12:].mean() < -0.99
    assert len(row["image_grid_thw"]) == 2 and int(row["mm_token_type_ids"].sum()) == 6
    assert rows.encoder.length(training.parse(rows.source.row(0)), [(96, 32)] * 2) == len(row["input_ids"])


def test_system_turns_and_rows_without_images(images, processor):
    system = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
        ]
    }
    rows = _rows(images, processor, system, GOOD)
    assert rows.without_images == [1] and "pixel_values" not in rows[0]
    assert processor.tokenizer.decode(rows[0]["input_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>")


BAD = {
    "broken JSON": (b'{"image": "a.png"', "is not valid JSON"),
    "not UTF-8": (b'{"question": "\xff\xfe", "answer": "1"}', "is not UTF-8"),
    "a list": ([1], "is a list, not an object"),
    "nothing in it": ({}, "needs exactly one of"),
    "two forms": ({**GOOD, "messages": []}, "has messages, answer"),
    "no assistant": ({"messages": [{"role": "user", "content": "Hi"}]}, "no assistant turn"),
    "empty answer": ({**GOOD, "answer": "  "}, "empty assistant turn"),
    "no question": ({"answer": "7"}, "turn 1 has no text"),
    "assistant first": ({"messages": [{"role": "assistant", "content": "Hi"}]}, "begins with the assistant"),
    "unknown role": ({"messages": [{"role": "tool", "content": "Hi"}]}, "role 'tool'"),
    "turns not a list": ({"messages": "Hi"}, "must be a list"),
    "turn not an object": ({"messages": ["Hi"]}, "turn 1 is a str"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "neither text nor an image"),
    "missing image": ({**GOOD, "image": "none.png"}, "image none.png does not exist"),
    "no image": ({**GOOD, "image": "text.png"}, "image text.png cannot be read"),
    "cut image": ({**GOOD, "image": "cut.png"}, "image cut.png cannot be read"),
    "thin image": ({**GOOD, "image": "thin.png"}, "thin.png is 8000 x 8: one side is more than 200 times the other"),
    "image of another type": ({**GOOD, "image": [3]}, "an image that is a int"),
    "too few images": ({**GOOD, "question": "<image><image>?"}, "has 1 images, and a place for another"),
    "too many images": (
        {**GOOD, "image": ["a.png", "a.png"], "question": "<image>?"},
        "has 2 images and places for 1",
    ),
    "image and images": ({**GOOD, "images": []}, "both image and images"),
    "image in an answer": (
        {"image": "a.png", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<image>"}]},
        "image in an assistant",
    ),
    "image token": ({**GOOD, "question": "What is <|image_pad|>?"}, "<|image_pad|> in a text"),
    "too long": ({**GOOD, "question": "word " * 300}, "tokens long, more than 256"),
}


@pytest.fixture
def broken(images):
    (images / "text.png").write_text("no image")
    whole = (images / "a.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (8000, 8)).save(images / "thin.png")
    return images


def test_bad_rows_are_counted_reported_and_skipped(broken, processor):
    lines = [GOOD]
    for row, _ in BAD.values():
        lines += [row, b"", GOOD]  # an empty line is no row, but counts in line numbers
    rows = _rows(broken, processor, *lines)
    assert len(rows) == len(BAD) + 1 and rows.skipped.total == 2 * len(BAD) + 1
    for i, ((_, message), (line, reason)) in enumerate(zip(BAD.values(), rows.skipped.rows, strict=True)):
        assert line == 3 * i + 2 and message in reason, (list(BAD)[i], reason)
    text = str(rows.skipped)
    assert f"{len(BAD)} skipped" in text and "line 2: is not valid JSON" in text and f"and {len(BAD) - 20} more" in text


def test_only_bad_rows(images, processor):
    with pytest.raises(training.DataError, match="line 1: has no assistant"):
        _rows(images, processor, BAD["no assistant"][0])
    with pytest.raises(training.DataError, match="has no rows"):
        _rows(images, processor)


def test_images_that_break_later_stop_with_their_line(images, processor):
    rows = _rows(images, processor, b"", GOOD, decode=False)
    (images / "a.png").write_bytes((images / "a.png").read_bytes()[:100])
    with pytest.raises(training.DataError, match=r"rows.jsonl, line 2: image a.png cannot be read"):
        rows[0]


def test_headers_only(broken, processor):
    rows = _rows(broken, processor, {**GOOD, "image": "cut.png"}, {**GOOD, "image": "text.png"}, GOOD, decode=False)
    assert [line for line, _ in rows.skipped.rows] == [2]


def test_lengths_are_exact(images, processor):
    Image.new("RGB", (200, 130)).save(images / "b.png")
    row = {**GOOD, "image": ["a.png", "b.png"]}
    length = len(_rows(images, processor, row)[0]["input_ids"])
    assert len(_rows(images, processor, row, max_length=length)) == 1
    with pytest.raises(training.DataError, match=f"{length} tokens long, more than {length - 1}"):
        _rows(images, processor, row, max_length=length - 1)


def test_batches(images, processor):
    rows = _rows(
        images, processor, GOOD, {"question": "Hi", "answer": "Yo " * 20}, {**GOOD, "image": ["a.png", "b.png"]}
    )
    batch = training.Collator(processor)([rows[i] for i in range(3)])
    length = max(len(rows[i]["input_ids"]) for i in range(3))
    for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
        assert batch[name].shape == (3, length)
    for i in range(3):
        own = len(rows[i]["input_ids"])
        assert batch["attention_mask"][i].tolist() == [1] * own + [0] * (length - own)
        assert torch.equal(batch["labels"][i, :own], rows[i]["labels"]) and (batch["labels"][i, own:] == -100).all()
        assert (batch["input_ids"][i, own:] == processor.tokenizer.pad_token_id).all()
    assert batch["image_grid_thw"].shape == (3, 3) and batch["pixel_values"].shape[0] == 36


def test_relative_images_start_elsewhere(images, processor, tmp_path_factory):
    file = _write(tmp_path_factory.mktemp("elsewhere"), GOOD)
    assert len(training.Rows(training.JsonlRows(file, images=images), training.Encoder(processor))) == 1


def _hugging_face(count=4):
    import datasets

    rows = [{"pic": q.image, "query": q.question, "reply": q.answer} for q in scenes.held_out_questions(count)]
    return datasets.Dataset.from_list(rows).cast_column("pic", datasets.Image())


COLUMNS = {"image": "pic", "question": "query", "answer": "reply"}


def test_hugging_face_datasets(tmp_path, processor):
    import datasets

    dataset = _hugging_face()
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "split")
    encoder = training.Encoder(processor)
    rows = training.Rows(training.open_rows(str(tmp_path / "plain")), encoder, columns=COLUMNS)
    assert len(rows) == 4 and not rows.skipped.rows
    question = scenes.held_out_questions(4)[2]
    assert rows[2]["input_ids"].tolist() == sum(
        train.chat_ids(processor.tokenizer, question.question, question.answer, DIGITS.places), []
    )
    assert len(training.Rows(training.open_rows(str(tmp_path / "split"), split="test"), encoder, columns=COLUMNS)) == 1
    with pytest.raises(training.DataError, match="has the splits train, test"):
        training.open_rows(str(tmp_path / "split"))
    with pytest.raises(training.DataError, match="has no splits"):
        training.open_rows(str(tmp_path / "plain"), split="train")


def test_repositories_of_hugging_face_datasets(tmp_path, processor, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "test"):
        (tmp_path / "repository" / "data").mkdir(parents=True, exist_ok=True)
        _hugging_face().to_parquet(tmp_path / "repository" / "data" / f"{split}-00000-of-00001.parquet")
    sources = [training.open_rows(str(tmp_path / "repository"), split="train") for _ in range(2)]
    assert sources[0].fingerprint == sources[1].fingerprint  # or no run could resume
    rows = training.Rows(sources[0], training.Encoder(processor), columns=COLUMNS)
    expected = training.Rows(training.DatasetRows(_hugging_face()), training.Encoder(processor), columns=COLUMNS)
    assert len(rows) == 4 and all(torch.equal(rows[3][name], expected[3][name]) for name in expected[3])
    (tmp_path / "repository" / "data" / "test-00000-of-00001.parquet").write_text("rubbish")
    with pytest.raises(training.DataError, match="cannot be read as a dataset"):
        training.open_rows(str(tmp_path / "repository"), split="test")


def test_bad_rows_of_hugging_face_datasets(processor):
    import datasets

    buffer = io.BytesIO()
    scenes.held_out_questions(1)[0].image.save(buffer, "png")
    rows = [
        {"pic": {"bytes": data, "path": None}, "query": "Which?", "reply": reply}
        for data, reply in (
            (buffer.getvalue(), "1"),
            (b"no image", "1"),
            (buffer.getvalue(), ""),
            (buffer.getvalue()[:90], "1"),
        )
    ]
    dataset = datasets.Dataset.from_list(
        rows,
        features=datasets.Features(
            pic=datasets.Image(), query=datasets.Value("string"), reply=datasets.Value("string")
        ),
    )
    found = training.Rows(training.DatasetRows(dataset), training.Encoder(processor), columns=COLUMNS)
    assert len(found) == 1 and [line for line, _ in found.skipped.rows] == [2, 3, 4]


def test_what_is_no_source(tmp_path):
    with pytest.raises(training.DataError, match="does not exist"):
        training.open_rows(str(tmp_path / "nothing"))
    with pytest.raises(training.DataError, match="cannot be read as a dataset"):
        training.open_rows(str(tmp_path))
    with pytest.raises(training.DataError, match="save it to disk first"):
        training.DatasetRows(iter([]))


def test_datasets_library_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(training.DataError, match="pip install datasets"):
        training.open_rows(str(tmp_path))


def test_exported_digits(tmp_path, processor):
    rows = training.Rows(
        training.JsonlRows(write_rows(tmp_path / "train.jsonl", "train", 5)), training.Encoder(processor)
    )
    assert len(rows) == 5 and not rows.skipped.rows and not rows.without_images
