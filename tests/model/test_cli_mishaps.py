"""What goes wrong with ordinary files and machines: one line that says what, and no traceback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from qvl_model import cli, digits
from qvl_model.cli import generate, models


def _edit(file, *path, value):
    def change(checkpoint):
        content = json.loads((checkpoint / file).read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (checkpoint / file).write_text(json.dumps(content))

    return change


def _text(key, value):
    return _edit("config.json", "text_config", key, value=value)


def _vision(key, value):
    return _edit("config.json", "vision_config", key, value=value)


def _generation(key, value):
    return _edit("generation_config.json", key, value=value)


def _write(file, content):
    return lambda checkpoint: (checkpoint / file).write_text(content)


def _pickle(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, checkpoint / "pytorch_model.bin")


def _missing_shard(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = j %}{% endfor %}{% endfor %}"
RECURSION = "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"
CASES = {
    "hidden size of a word": (_text("hidden_size", "big"), "hidden_size"),
    "hidden size of nothing": (_text("hidden_size", None), "hidden_size"),
    "hidden size of a list": (_text("hidden_size", [64]), "hidden_size"),
    "hidden size of half": (_text("hidden_size", 3.5), "hidden_size"),
    "hidden size 0": (_text("hidden_size", 0), "hidden_size is 0, and must be from 1"),
    "hidden size -4": (_text("hidden_size", -4), "hidden_size is -4, and must be from 1"),
    "hidden size 1e9": (_text("hidden_size", 10**9), "hidden_size is 1000000000, and must be"),
    "hidden size 2^70": (_text("hidden_size", 2**70), "hidden_size is 1180591620717411303424"),
    "another hidden size": (_text("hidden_size", 256), "has another size than config.json says for .* such as model"),
    "no heads": (_text("num_attention_heads", 0), "num_attention_heads is 0"),
    "heads of a word": (_text("num_attention_heads", "4"), "num_attention_heads"),
    "no key heads": (_text("num_key_value_heads", 0), "num_key_value_heads is 0"),
    "heads that do not divide": (_text("num_key_value_heads", 4), "no multiple of the 4 of num_key_value_heads"),
    "no layers": (_text("num_hidden_layers", 0), "num_hidden_layers is 0"),
    "-1 layers": (_text("num_hidden_layers", -1), "num_hidden_layers is -1"),
    "1e9 layers": (_text("num_hidden_layers", 10**9), "num_hidden_layers is 1000000000"),
    "more layers": (_text("num_hidden_layers", 9), "lacks .* of the model's weights"),
    "MLP of 0": (_text("intermediate_size", 0), "intermediate_size is 0"),
    "no words": (_text("vocab_size", 0), "vocab_size is 0"),
    "three words": (_text("vocab_size", 3), "has another size than config.json says for .* such as model"),
    "unknown activation": (_text("hidden_act", "nope"), "hidden_act is 'nope', which is no activation"),
    "activation of a number": (_text("hidden_act", 3), "hidden_act"),
    "odd head": (_text("head_dim", 7), "even rotary"),
    "no head": (_text("head_dim", 0), "head_dim is 0"),
    "eps of a word": (_text("rms_norm_eps", "x"), "rms_norm_eps"),
    "unknown rope": (_text("rope_parameters", {"rope_type": "nope"}), "the rope_type 'nope'"),
    "rope of a word": (_text("rope_parameters", "x"), "rope_parameters"),
    "positions of a word": (_text("max_position_embeddings", "x"), "max_position_embeddings"),
    "no positions": (_text("max_position_embeddings", 0), "max_position_embeddings is 0"),
    "unknown dtype": (_edit("config.json", "dtype", value="float7"), "float7"),
    "dtype of a list": (_edit("config.json", "dtype", value=[]), "does not fit"),
    "image token -1": (
        _edit("config.json", "image_token_id", value=-1),
        "image_token_id is -1, and its tokenizer writes images as 6",
    ),
    "image token 1e9": (
        _edit("config.json", "image_token_id", value=10**9),
        "image_token_id is 1000000000, and its tokenizer",
    ),
    "text of nothing": (_edit("config.json", "text_config", value=None), "text_config must be a mapping"),
    "text of a word": (_edit("config.json", "text_config", value="x"), "text_config must be a mapping"),
    "vision of a list": (_edit("config.json", "vision_config", value=[]), "vision_config must be a mapping"),
    "-1 blocks": (_vision("depth", -1), "depth is -1"),
    "1e9 blocks": (_vision("depth", 10**9), "depth is 1000000000"),
    "no patches": (_vision("patch_size", 0), "patch_size is 0"),
    "no vision heads": (_vision("num_heads", 0), "num_heads is 0"),
    "five vision heads": (_vision("num_heads", 5), "no multiple of twice the 5 of num_heads"),
    "a block that is not there": (_vision("deepstack_visual_indexes", [99]), "deepstack_visual_indexes has 99"),
    "a block before the first": (_vision("deepstack_visual_indexes", [-1]), "deepstack_visual_indexes has -1"),
    "no merging": (_vision("spatial_merge_size", 0), "spatial_merge_size is 0"),
    "seven positions": (_vision("num_position_embeddings", 7), "another size"),
    "temperature of a word": (_generation("temperature", "x"), "generation_config.json: temperature is 'x'"),
    "temperature -1": (_generation("temperature", -1), "temperature is -1"),
    "top_p 7": (_generation("top_p", 7), "top_p is 7"),
    "top_k of a word": (_generation("top_k", "x"), "top_k is 'x'"),
    "end of a word": (_generation("eos_token_id", "x"), "eos_token_id is 'x'"),
    "end beyond the words": (_generation("eos_token_id", 10**9), "eos_token_id is 1000000000"),
    "padding beyond the words": (_generation("pad_token_id", 10**9), "pad_token_id is 1000000000"),
    "sampling of a word": (_generation("do_sample", "x"), "do_sample is 'x'"),
    "-5 tokens": (_generation("max_new_tokens", -5), "max_new_tokens"),
    "broken generation config": (_write("generation_config.json", "{"), "cannot be read as JSON"),
    "generation config of a list": (_write("generation_config.json", "[]"), "must hold a mapping"),
    "broken template": (_write("chat_template.jinja", "{% if %}"), "the chat template of .* cannot be used"),
    "endless template": (_write("chat_template.jinja", LOOP), "it takes more than 5 s"),
    "template without end": (
        _write("chat_template.jinja", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
        "recursion",
    ),
    "large template": (_write("chat_template.jinja", "{{ 'x' * 10**10 }}"), "it multiplies"),
    "hostile template": (_write("chat_template.jinja", "{{ ''.__class__.__mro__ }}"), "unsafe"),
    "empty template": (_write("chat_template.jinja", ""), "has no chat template"),
    "sizes of pictures": (
        _edit("preprocessor_config.json", "size", value={"shortest_edge": -1, "longest_edge": -4}),
        "refuses the input",
    ),
    "patches of a word": (_edit("preprocessor_config.json", "patch_size", value="x"), "refuses the input"),
    "tokenizer config of a list": (_write("tokenizer_config.json", "[]"), "must hold a mapping"),
    "pickle": (_pickle, "cannot be loaded|lacks"),
    "empty weights": (_write("model.safetensors", ""), "cannot be loaded"),
    "missing shard": (_missing_shard, "cannot be loaded"),
}


def _broken(name, directory):
    """The command line that uses the checkpoint of a case."""
    checkpoint = shutil.copytree(digits.CHECKPOINT, directory / "checkpoint")
    CASES[name][0](checkpoint)
    arguments = ["--image", str(digits.SAMPLE), "--prompt", "x", "--max-new-tokens", "2"]
    return ["generate", "--model", str(checkpoint), *arguments]


def _check_error(name, status, error):
    assert status == 2 and error.startswith("qvl: ") and error.count("\n") == 1 and len(error) < 1200, error
    assert re.search(CASES[name][1], error), error


@pytest.mark.parametrize("name", CASES)
def test_checkpoints(name, tmp_path, capsys):
    start = time.monotonic()
    status = cli.main(_broken(name, tmp_path))
    _check_error(name, status, capsys.readouterr().err)
    assert time.monotonic() - start < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_checkpoints_in_a_process(name, tmp_path):
    """What libraries print when they are loaded, and a process that ends, count too."""
    process = _process(*_broken(name, tmp_path))
    out, error = process.communicate(timeout=120)
    _check_error(name, process.returncode, error)
    assert out == ""


def _process(*arguments, **options):
    command = [sys.executable, "-m", "qvl_model.cli", *map(str, arguments)]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # where this process ignores it
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard, **options)


def test_closed_pipes():
    process = _process("generate", "--image", digits.SAMPLE, "--prompt", "Read the digits.")
    process.stdout.close()
    assert process.wait(120) in (0, 141) and "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize("after", [0.05, 1.0, 3.0])
def test_ctrl_c_at_any_time(after):
    process = _process("generate", "--image", digits.SAMPLE, "--prompt", "x", "--max-new-tokens", "4000")
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert "Traceback" not in error or after < 0.1, error  # before Python has begun, it is Python's to say
    assert process.returncode in (130, -signal.SIGINT, 0) or after < 0.1


def test_pipes_and_devices_as_images(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    for file in (tmp_path / "pipe.png", "/dev/zero"):
        assert cli.main(["generate", "--image", str(file), "--prompt", "x"]) == 2
        assert "no regular file" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directories_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert cli.main(["quantize", "--model", str(digits.CHECKPOINT), "--out", str(tmp_path / "closed" / "x")]) == 2
    assert "ermission" in capsys.readouterr().err


def test_a_path_below_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["quantize", "--model", str(digits.CHECKPOINT), "--out", str(tmp_path / "file" / "x")]) == 2
    assert cli.main(["batch", str(tmp_path), "--prompt", "x", "--out", str(tmp_path / "file" / "x.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "prometheus_client"])
def test_missing_packages(name, monkeypatch, capsys):
    for module in [one for one in sys.modules if one.split(".")[0] == name or one.startswith("qvl_model.serving")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["serve", "--port", "0"]) == 2
    assert "pip install 'qvl[serve]'" in capsys.readouterr().err


def test_what_nobody_expected(monkeypatch, capsys):
    """Any other error is one line too; --debug shows where it comes from."""

    def fail(*_):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(generate, "images_of", fail)
    assert cli.main(["generate", "--prompt", "x"]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("qvl: RuntimeError: first second (unexpected; --debug shows where") and error.count("\n") == 1
    )
    for arguments in (["--debug", "generate"], ["generate", "--debug"]):
        with pytest.raises(RuntimeError):
            cli.main([*arguments, "--prompt", "x"])


def test_memory_and_disk(monkeypatch, capsys):
    for raised, message in (
        (MemoryError(), "not enough memory"),
        (OSError(28, "No space left on device", "out"), "the disk is full"),
        (KeyboardInterrupt(), "interrupted"),
    ):

        def fail(*_, raised=raised):
            raise raised

        monkeypatch.setattr(generate, "images_of", fail)
        assert cli.main(["generate", "--prompt", "x"]) == (130 if isinstance(raised, KeyboardInterrupt) else 2)
        assert message in capsys.readouterr().err


def test_the_time_limit_is_of_the_main_thread():
    """In another one, where no signal arrives, there is none."""
    done = []

    def slow():
        with models.time_limit(0.05):
            time.sleep(0.2)
            done.append(True)

    thread = threading.Thread(target=slow)
    thread.start()
    thread.join()
    assert done
    with pytest.raises(TimeoutError):
        slow()
    assert len(done) == 1 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
