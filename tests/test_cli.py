"""The qvl command as a user runs it."""

import json
import subprocess
import sys

import pytest

from qvl_model import cli, digits
from qvl_model.digits import scenes


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "qvl_model.cli", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("stock", [False, True], ids=["accelerated", "stock"])
def test_generate_reads_a_picture(tmp_path, stock):
    question = next(q for q in scenes.held_out_questions(100) if q.kind == "read" and len(q.answer) == 5)
    question.image.save(tmp_path / "digits.png")
    done = run("generate", "--image", tmp_path / "digits.png", "--prompt", question.question, *(["--stock"] if stock else []))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == question.answer
    assert "first token after" in done.stderr and "tok/s" in done.stderr
    assert ("[stock]" if stock else "[accelerated]") in done.stderr
    assert "noise" not in done.stderr


def test_generate_on_the_sample_picture():
    done = run("generate", "--image", digits.SAMPLE, "--prompt", "Read the digits from left to right.")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3


def test_random_weights_are_announced(tmp_path, capsys):
    for file in digits.CHECKPOINT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, cli.RANDOM_KEY: True}))
    assert cli.main(["generate", "--model", str(tmp_path), "--image", str(digits.SAMPLE), "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
    assert "noise" in capsys.readouterr().err


def test_inspect(capsys):
    assert cli.main(["inspect", str(digits.CHECKPOINT)]) == 0
    out = capsys.readouterr().out
    assert "Qwen3VLTextDecoderLayer" in out and "kept:" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--image", "missing.png", "--prompt", "x"], "cannot read picture missing.png"),
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


def test_not_a_picture(tmp_path, capsys):
    file = tmp_path / "text.png"
    file.write_text("not a picture")
    assert cli.main(["generate", "--image", str(file), "--prompt", "x"]) == 2
    assert "cannot read picture" in capsys.readouterr().err


def test_broken_weights(tmp_path, capsys):
    for source in digits.CHECKPOINT.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", "x"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_another_architecture(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "qwen3_vl" in capsys.readouterr().err
