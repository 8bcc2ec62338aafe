"""QVL through its processor, the rows and batches of training, and whole runs."""

import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from test_training_run import _command, _environment, _kill_in_the_middle, _losses
from training_data import settings, tiny_checkpoint, write_rows
from transformers import AutoModelForImageTextToText

from qvl_model import capacity, cli, digits, training
from qvl_model.digits import scenes
from qvl_model.processing import load_processor
from qvl_model.qvl import QVLForConditionalGeneration
from qvl_model.qvl.processing import QVLImageProcessor, QVLProcessor
from qvl_model.training import TrainConfig


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A directory with the tiny QVL checkpoint and its data, and the losses of an uninterrupted run of ``settings``."""
    directory = tmp_path_factory.mktemp("training")
    _train(directory, directory / "plain")
    return directory


@pytest.fixture(scope="module")
def processor(shared):
    return load_processor(shared / "qvl")


def _train(directory, out, **groups):
    groups["output"] = {"directory": str(out), **groups.get("output", {})}
    return training.train(TrainConfig.from_dict(settings(directory, "qvl", **groups)))


def _image(width, height, value):
    return Image.new("RGB", (width, height), (value,) * 3)


def test_images_become_pixels():
    image_processor = QVLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=96 * 96)
    image = scenes.held_out_questions(1)[0].image
    expected = np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(image_processor(image).numpy() - expected).max() < 1e-6
    for (width, height), shape in {
        (100, 41): (48, 96),
        (8, 8): (32, 32),
        (400, 100): (48, 192),
        (17, 15): (32, 48),
    }.items():
        pixels = image_processor(_image(width, height, 255))
        assert pixels.shape == (3, *shape) and torch.all(pixels == 1), (width, height)
    with pytest.raises(ValueError, match="aspect ratio"):
        image_processor(_image(4000, 8, 0))
    with pytest.raises(ValueError, match="min_pixels"):
        QVLImageProcessor(min_pixels=100, max_pixels=10)


def test_processor(processor):
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = processor(
        images=[_image(96, 32, 255), _image(32, 64, 0)], text=[prompt, prompt], return_tensors="pt", padding=True
    )
    assert inputs["pixel_values"].shape == (2, 3, 64, 96) and inputs["pixel_attention_mask"].shape == (2, 64, 96)
    assert inputs["pixel_attention_mask"].sum((1, 2)).tolist() == [96 * 32, 32 * 64]
    assert torch.equal(inputs["pixel_values"][0, 0] == 1, inputs["pixel_attention_mask"][0].bool())
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [1, 1]
    two = processor(
        images=[[_image(32, 32, 0)], [_image(32, 32, 0)] * 2],
        text=[prompt, prompt + prompt],
        return_tensors="pt",
        padding=True,
    )
    assert two["pixel_values"].shape == (2, 2, 3, 32, 32) and two["pixel_attention_mask"].sum((2, 3)).tolist() == [
        [1024, 0],
        [1024, 1024],
    ]
    assert "pixel_values" not in processor(text="Hi")
    with pytest.raises(ValueError, match="1 image tokens .* for 2 images"):
        processor(images=[_image(32, 32, 0)] * 2, text=[prompt])
    with pytest.raises(ValueError, match="no videos"):
        processor(videos=[object()], text="x")


def test_processor_is_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = QVLProcessor.from_pretrained(tmp_path)
    assert (
        vars(again.image_processor) == vars(processor.image_processor)
        and again.chat_template == processor.chat_template
    )
    assert again(text="Hi").input_ids == processor(text="Hi").input_ids
    for wrong in (
        "[]",
        '{"image_processor_type": "Qwen2VLImageProcessor"}',
        '{"image_processor_type": "QVLImageProcessor", "x": 1}',
        "rubbish",
    ):
        (tmp_path / "preprocessor_config.json").write_text(wrong)
        with pytest.raises(ValueError, match="is not of a QVL image processor"):
            QVLProcessor.from_pretrained(tmp_path)


def test_rows_and_batches(processor, tmp_path):
    for name, image in {"a": _image(96, 32, 255), "b": _image(32, 64, 255)}.items():
        image.save(tmp_path / f"{name}.png")
    turns = [
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "<image>And?"},
        {"role": "assistant", "content": "2"},
    ]
    lines = [
        {"images": ["a.png", "b.png"], "messages": turns},
        {"question": "Hi", "answer": "Yo"},
        {"image": "b.png", "question": "?", "answer": "3"},
        {"images": ["a.png"] * 3, "question": "?", "answer": "4"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = training.Rows(training.JsonlRows(tmp_path / "rows.jsonl"), training.Encoder(processor, 64, max_images=2))
    assert rows.skipped.rows == [(4, "has 3 images, more than the model's 2")]
    assert rows[0]["pixel_values"].shape == (1, 2, 3, 64, 96) and rows[0]["pixel_attention_mask"].sum(
        (2, 3)
    ).tolist() == [[96 * 32, 32 * 64]]
    assert [
        rows.encoder.length(training.parse(lines[i]), [(96, 32)] * count) for i, count in ((0, 2), (1, 0), (2, 1))
    ] == [len(rows[i]["input_ids"]) for i in range(3)]
    batch = training.Collator(processor)([rows[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 2, 3, 64, 96)
    assert batch["pixel_attention_mask"].sum((2, 3)).tolist() == [[96 * 32, 32 * 64], [0, 0], [32 * 64, 0]]
    assert torch.equal((batch["pixel_values"] == 1).all(2), batch["pixel_attention_mask"].bool())
    assert torch.all(training.Collator(processor)([rows[1]])["attention_mask"] == 1)


def test_a_batch_is_its_rows(shared, processor):
    """A row's result does not depend on padding or on the other rows."""
    torch.manual_seed(0)
    model = QVLForConditionalGeneration.from_pretrained(shared / "plain" / "final", dtype=torch.float32).eval()
    encoder, collator = training.Encoder(processor), training.Collator(processor)
    rows = []
    for i, size in enumerate(((96, 32), (64, 64), (32, 48))):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), np.uint8))
        images = [image] * (i % 3)
        rows.append(encoder(training.parse({"images": images, "question": "word " * (i + 1), "answer": "7"}), images))
    with torch.no_grad():
        together = model(**collator(rows)).logits
        for i, row in enumerate(rows):
            alone = model(**collator([row])).logits[0]
            assert (together[i, : len(alone)] - alone).abs().max() <= 2e-5 * alone.abs().max()


def test_a_run(shared, tmp_path, capsys):
    losses = _losses(shared / "plain")
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    final = shared / "plain" / "final"
    assert json.loads((final / "config.json").read_text())["architectures"] == ["QVLForConditionalGeneration"]
    model = AutoModelForImageTextToText.from_pretrained(final, dtype="auto")
    assert isinstance(model, QVLForConditionalGeneration) and all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert cli.main(["verify", str(final)]) == 0
    out = capsys.readouterr().out
    assert "QVLCrossAttention (heads)" in out and "4 in each of 2" in out and "complete" in out
    assert cli.main(["verify", str(final), "--spec", "qvl-2b"]) == 1
    assert "model.language_model.layers: has 2 entries, the specification says 32" in capsys.readouterr().out
    assert cli.main(["verify", str(final), "--spec", "qwen3-vl-2b"]) == 2
    assert "described by QVLConfig" in capsys.readouterr().err
    assert cli.main(["inspect", str(final)]) == 0 and "QVLDecoderLayer" in capsys.readouterr().out
    for variant in ([], ["--stock"]):
        assert (
            cli.main(
                [
                    "generate",
                    "--model",
                    str(final),
                    "--image",
                    str(digits.SAMPLE),
                    "--prompt",
                    "Hi",
                    "--max-new-tokens",
                    "3",
                    *variant,
                ]
            )
            == 0
        )


CHANGES = {
    "stock": {"model": {"accelerate": False}},
    "gradient checkpointing": {"run": {"gradient_checkpointing": True}},
    "accumulation": {"run": {"batch_size": 2, "accumulation": 2}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_must_not_change_the_curve(shared, tmp_path, change):
    _train(shared, tmp_path, **CHANGES[change])
    assert _losses(tmp_path) == pytest.approx(_losses(shared / "plain"), rel=2e-5)


def test_dropout_and_bf16_change_it(shared, tmp_path):
    plain = _losses(shared / "plain")
    for name, groups in {
        "hidden": {"model": {"hidden_dropout": 0.2}},
        "attention": {"model": {"attention_dropout": 0.2}},
        "bf16": {"run": {"precision": "bf16"}},
    }.items():
        _train(shared, tmp_path / name, **groups)
        assert 1e-6 < max(abs(a - b) for a, b in zip(_losses(tmp_path / name), plain, strict=True)) < 0.5, name


def test_resume(shared, tmp_path):
    """As after a kill: the newest checkpoint is incomplete. Dropout is on, so the random state must be restored too."""
    groups = {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}
    _train(shared, tmp_path, **groups)
    whole = _losses(tmp_path)
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    assert _train(shared, tmp_path, **groups).resumed_from == 3 and _losses(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_are_one_and_resume_after_kill(shared, tmp_path, sharding):
    long = {"run": {"steps": 30}, "output": {"save_every": 5}}
    _train(shared, tmp_path / "one", **long)
    out = tmp_path / "two"
    config = settings(
        shared,
        "qvl",
        run={"steps": 30, "batch_size": 2, "sharding": sharding},
        output={"directory": str(out), "save_every": 5},
    )
    command = _command(config, tmp_path, ranks=2)
    _kill_in_the_middle(command, out, 8)
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "going on from" in done.stderr, done.stderr[-3000:]
    assert _losses(out) == pytest.approx(_losses(tmp_path / "one"), rel=1e-3)
    assert _losses(out)[:8] == pytest.approx(_losses(tmp_path / "one")[:8], rel=1e-5)
    assert capacity.verify(QVLForConditionalGeneration.from_pretrained(out / "final")).ok


def test_tiny_checkpoints_are_of_both_families(tmp_path):
    assert isinstance(load_processor(tiny_checkpoint(tmp_path / "a", "qvl")), QVLProcessor)
    assert not isinstance(load_processor(tiny_checkpoint(tmp_path / "b")), QVLProcessor)
    assert write_rows(tmp_path / "rows.jsonl", "train", 1).is_file()
