"""The qvl command as a user runs it."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from qvl_model import cli, digits
from qvl_model.cli import generate, models
from qvl_model.digits import scenes


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "qvl_model.cli", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("stock", [False, True], ids=["accelerated", "stock"])
def test_generate_reads_a_image(tmp_path, stock):
    question = next(q for q in scenes.held_out_questions(100) if q.kind == "read" and len(q.answer) == 5)
    question.image.save(tmp_path / "digits.png")
    done = run(
        "generate", "--image", tmp_path / "digits.png", "--prompt", question.question, *(["--stock"] if stock else [])
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == question.answer
    assert "first token after" in done.stderr and "tok/s" in done.stderr
    assert ("[stock]" if stock else "[accelerated]") in done.stderr
    assert "noise" not in done.stderr


def test_generate_on_the_sample_image():
    done = run("generate", "--image", digits.SAMPLE, "--prompt", "Read the digits from left to right.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "8 6 9"


def test_the_sample_image_is_of_held_out_digits():
    sample = scenes.held_out_questions(5)[4]
    assert np.array_equal(sample.image, Image.open(digits.SAMPLE).convert("RGB")) and sample.answer == "8 6 9"


def test_images_add_up_over_repeated_options(monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "images_of", lambda files: seen.extend(files) or models.checkpoint_of("/no/such/dir"))
    assert cli.main(["generate", "--image", "a", "b", "--image", "c", "--prompt", "x"]) == 2
    assert seen == ["a", "b", "c"]


def test_random_weights_are_announced(tmp_path, capsys):
    for file in digits.CHECKPOINT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, models.RANDOM_KEY: True}))
    assert (
        cli.main(
            [
                "generate",
                "--model",
                str(tmp_path),
                "--image",
                str(digits.SAMPLE),
                "--prompt",
                "Hi",
                "--max-new-tokens",
                "2",
            ]
        )
        == 0
    )
    assert "noise" in capsys.readouterr().err


def test_inspect(capsys):
    assert cli.main(["inspect", str(digits.CHECKPOINT)]) == 0
    out = capsys.readouterr().out
    assert "Qwen3VLTextDecoderLayer" in out and "kept:" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--image", "missing.png", "--prompt", "x"], "image missing.png does not exist"),
        (["generate", "--model", "/no/such/dir", "--prompt", "x"], "is not a directory"),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], "at least 1"),
        (["inspect", "/tmp"], "no config.json"),
    ],
    ids=["image", "model", "tokens", "inspect"],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_not_a_image(tmp_path, capsys):
    file = tmp_path / "text.png"
    file.write_text("not an image")
    assert cli.main(["generate", "--image", str(file), "--prompt", "x"]) == 2
    assert "cannot be read: it is no image" in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the shipped checkpoint, to be broken."""
    return shutil.copytree(digits.CHECKPOINT, tmp_path / "checkpoint")


def _cut_weights(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _drop_a_layer(checkpoint):
    weights = {
        key: value for key, value in load_file(checkpoint / "model.safetensors").items() if "layers.1." not in key
    }
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def _break_a_weight(name, value):
    def edit(checkpoint):
        weights = dict(load_file(checkpoint / "model.safetensors"))
        weights[name].view(-1)[-1] = value
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})

    return edit


# In a matrix that every format quantises, an embedding, a norm and a bias.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.language_model.layers.1.mlp.up_proj.weight", float("nan")),
        ("model.language_model.embed_tokens.weight", float("inf")),
        ("model.language_model.layers.0.self_attn.q_norm.weight", -float("inf")),
        ("model.visual.blocks.2.mlp.linear_fc2.bias", float("nan")),
    ],
)
def test_weights_that_are_not_finite_are_refused(name, value, checkpoint, tmp_path, capsys):
    _break_a_weight(name, value)(checkpoint)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}))
    settings = {
        "model": {"path": str(checkpoint)},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "run": {"steps": 1, "device": "cpu"},
        "output": {"directory": str(tmp_path / "out")},
    }
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    for arguments in (
        ["generate", "--model", str(checkpoint), "--prompt", "x"],
        ["generate", "--stock", "--model", str(checkpoint), "--prompt", "x"],
        ["quantize", "--model", str(checkpoint), "--out", str(tmp_path / "packed")],
        ["quantize", "--model", str(checkpoint), "--weights", "vision=int4", "--out", str(tmp_path / "packed")],
        ["train", str(tmp_path / "train.yaml")],
    ):
        assert cli.main(arguments) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert (
            error.startswith("qvl: ")
            and re.search("NaN or (Inf|infinite)", error)
            and (name in error or "lm_head.weight" in error)
        ), error
    assert not (tmp_path / "packed").exists() and not list((tmp_path / "out").glob("checkpoint-*"))
    assert cli.main(["verify", str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert f"{name.rpartition('.')[0]}: {name.rpartition('.')[2]} holds NaN or Inf" in out and "1 violation of" in out


def _edit_config(**changes):
    def edit(checkpoint):
        config = json.loads((checkpoint / "config.json").read_text())
        for key, value in changes.items():
            config[key] = {**config.get(key, {}), **value}
        (checkpoint / "config.json").write_text(json.dumps(config))

    return edit


def _write(name, text):
    return lambda checkpoint: (checkpoint / name).write_text(text)


def _remove(name):
    return lambda checkpoint: (checkpoint / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_weights, "cannot be loaded"),
        (_drop_a_layer, "lacks 11 of the model's weights"),
        (_edit_config(text_config={"hidden_size": 256}), "another size"),
        (_edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), "cannot be loaded"),
        (_remove("model.safetensors"), "cannot be loaded"),
        (_remove("preprocessor_config.json"), "cannot be loaded"),
        (_remove("tokenizer.json"), "cannot be loaded"),
        (_remove("chat_template.jinja"), "has no chat template"),
        (_write("preprocessor_config.json", "[]"), "cannot be loaded"),
        (_write("tokenizer.json", "rubbish"), "cannot be loaded"),
        (_write("config.json", '{"x"'), "config.json cannot be read"),
    ],
    ids=[
        "cut weights",
        "missing weights",
        "other sizes",
        "quantised",
        "no weights",
        "no image processor",
        "no tokenizer",
        "no template",
        "wrong json",
        "bad tokenizer",
        "bad config",
    ],
)
def test_broken_checkpoints(checkpoint, damage, message, capsys):
    damage(checkpoint)
    assert cli.main(["generate", "--model", str(checkpoint), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.strip().splitlines()[-1].startswith("qvl: ")


@pytest.mark.parametrize(
    ("size", "message"), [((4000, 8), "200 times the other"), ((20000, 20000), "million pixels")], ids=["thin", "huge"]
)
def test_images_of_impossible_sizes(tmp_path, size, message, capsys):
    Image.new("1", size).save(tmp_path / "a.png")
    assert cli.main(["generate", "--image", str(tmp_path / "a.png"), "--prompt", "x"]) == 2
    assert message in capsys.readouterr().err


def test_image_tokens_in_the_prompt(capsys):
    assert cli.main(["generate", "--image", str(digits.SAMPLE), "--prompt", "what is <|image_pad|>"]) == 2
    assert "<|image_pad|>" in capsys.readouterr().err


def test_another_architecture(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "qwen3_vl" in capsys.readouterr().err
