"""``qvl quantize`` as a citizen of the file system: what it leaves behind, whom it waits for, and what it refuses."""

import fcntl
import json
import os
import shutil
import stat

import pytest
from safetensors.torch import load_file, save_file

from qvl_model import cli, digits
from qvl_model.quantization.convert import section_of


def _quantize(source, out, *more):
    return cli.main(["quantize", "--model", str(source), "--out", str(out), *more])


@pytest.fixture
def source(tmp_path):
    """A copy of the checkpoint that ships, to be changed."""
    return shutil.copytree(digits.CHECKPOINT, tmp_path / "source")


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        assert _quantize(digits.CHECKPOINT, tmp_path / "out") == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    for file in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file.name


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / ".out.tmp"
    (left / "additional_chat_templates").mkdir(parents=True)
    (left / "packed.safetensors").write_bytes(b"half of it")
    assert _quantize(digits.CHECKPOINT, tmp_path / "out") == 0
    assert os.listdir(tmp_path) == ["out"] and "additional_chat_templates" not in os.listdir(tmp_path / "out")


def test_two_at_once(tmp_path, capsys):
    """The second one says so at once, and takes nothing from the first."""
    first = tmp_path / ".out.tmp"
    first.mkdir()
    (first / "packed.safetensors").write_bytes(b"in work")
    handle = os.open(first, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert _quantize(digits.CHECKPOINT, tmp_path / "out") == 2
    assert "another process is writing to" in capsys.readouterr().err and os.listdir(tmp_path) == [".out.tmp"]
    assert (first / "packed.safetensors").read_bytes() == b"in work"
    os.close(handle)
    assert _quantize(digits.CHECKPOINT, tmp_path / "out") == 0 and os.listdir(tmp_path) == ["out"]


def test_what_is_there_is_kept_without_force(tmp_path, capsys):
    out = tmp_path / "out"
    assert _quantize(digits.CHECKPOINT, out) == 0 and _quantize(digits.CHECKPOINT, out, "--weights", "int4") == 2
    assert "exists; give a directory that does not" in capsys.readouterr().err
    assert section_of(out)["weights"]["text"] == "int8"
    assert _quantize(digits.CHECKPOINT, out, "--weights", "int4", "--force") == 0
    assert section_of(out)["weights"]["text"] == "int4/int8" and os.listdir(tmp_path) == ["out"]


def test_tensors_that_would_be_lost_are_refused(source, tmp_path, capsys):
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (source / "config.json").write_text(json.dumps(config))
    assert _quantize(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "tensors that its config.json has no place for, such as model.language_model.layers.1." in error
    weights = load_file(digits.CHECKPOINT / "model.safetensors")
    shutil.copy(digits.CHECKPOINT / "config.json", source)
    save_file(
        {**weights, "extra.weight": weights["model.language_model.norm.weight"].clone()}, source / "model.safetensors"
    )
    assert _quantize(source, tmp_path / "out") == 2 and "extra.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda source: (source / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid x"
            ),
            "Git LFS",
        ),
        (lambda source: (source / "model.safetensors.incomplete").touch(), "has not ended"),
    ],
    ids=["pointer", "half"],
)
def test_weights_that_are_not_all_there(source, change, message, capsys):
    change(source)
    assert cli.main(["generate", "--model", str(source), "--prompt", "x"]) == 2
    assert message in capsys.readouterr().err
