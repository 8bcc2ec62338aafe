"""No code that a checkpoint names runs, even if a prompt is answered with yes, and nothing is fetched for a missing
file.
"""

import ast
import io
import json
import pickle
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qvl_model
import qvl_model.training as training
from qvl_model import cli, digits, pretrained
from qvl_model.checkpoint_files import load_tokenizer
from qvl_model.digits.export import write_rows

ROOT = Path(__file__).resolve().parents[2]
OUR_OWN = ("QVLProcessor", "QVLImageProcessor")  # which read JSON, and a tokenizer by load_tokenizer
AUTO_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "AutoProcessor",
    "AutoImageProcessor",
    "AutoVideoProcessor",
    "AutoFeatureExtractor",
)


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Answers every prompt with yes, and records every network access."""
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args[-1] if args else kwargs)
        raise OSError("the tests reach no network")

    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 1000))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not calls, f"the network was asked for {calls}"


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "it-ran"


@pytest.fixture
def checkpoint(tmp_path, marker):
    """A copy of the shipped checkpoint, with Python files that leave a mark if they run."""
    directory = shutil.copytree(digits.CHECKPOINT, tmp_path / "checkpoint")
    _write_code(directory / "evil.py", marker)
    return directory


def _write_code(file, marker):
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        f"open({str(marker)!r}, 'w').close()\nfrom transformers import PreTrainedConfig\n"
        "class Evil(PreTrainedConfig): model_type = 'evil'\ndef generate(model, *args, **kwargs): return None\n"
    )


def _edit(file, **changes):
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**values, **changes}))


def _auto_map(where="evil.Evil"):
    return {name: [where, where] if name == "AutoTokenizer" else where for name in AUTO_CLASSES}


def _another_model(checkpoint):
    _edit(checkpoint / "config.json", model_type="evil", auto_map=_auto_map())


def _another_model_on_a_server(checkpoint):
    _edit(checkpoint / "config.json", model_type="evil", auto_map=_auto_map("evil/code--evil.Evil"))


def _its_own_tokenizer(checkpoint):
    _edit(checkpoint / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=_auto_map())


def _tokenizer_that_loads_a_model(checkpoint):
    _edit(checkpoint / "config.json", auto_map=_auto_map())
    _edit(checkpoint / "preprocessor_config.json", auto_map=_auto_map())
    _edit(checkpoint / "tokenizer_config.json", tokenizer_class="AutoFeatureExtractor")


def _tokenizer_of_tokenizers(checkpoint):
    _edit(checkpoint / "tokenizer_config.json", tokenizer_class="RagTokenizer")
    for name in ("question_encoder_tokenizer", "generator_tokenizer"):
        (checkpoint / name).mkdir()
        shutil.copy(checkpoint / "evil.py", checkpoint / name)
        _edit(checkpoint / name / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=_auto_map())


def _everything_names_code(checkpoint):
    for name in (
        "config.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
        "video_preprocessor_config.json",
    ):
        _edit(checkpoint / name, auto_map=_auto_map(), custom_generate=str(checkpoint))
    (checkpoint / "custom_generate").mkdir()
    shutil.copy(checkpoint / "evil.py", checkpoint / "custom_generate" / "generate.py")
    (checkpoint / "custom_generate" / "requirements.txt").write_text("")


class _Pickled:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def _pickled_weights(checkpoint):
    weights = dict(load_file(checkpoint / "model.safetensors"))
    torch.save({**weights, "evil": _Pickled(checkpoint.parent / "it-ran")}, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()


def _attention_from_a_server(checkpoint):
    _edit(checkpoint / "config.json", attn_implementation="evil/attention")


def _attention_of_a_part(checkpoint):
    _edit(checkpoint / "config.json", attn_implementation={"vision_config": "evil/attention"})


def _attention_inside_a_part(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    _edit(
        checkpoint / "config.json", vision_config={**config["vision_config"], "_attn_implementation": "evil/attention"}
    )


def _attention_of_another_type(checkpoint):
    _edit(checkpoint / "config.json", attn_implementation=3)


REFUSED = {
    "another model": (_another_model, "is a evil model; qvl runs qwen3_vl and qvl. Its own Python code (auto_map)"),
    "another model on a server": (_another_model_on_a_server, "qvl runs no code from checkpoints"),
    "attention": (_attention_from_a_server, "attention code from elsewhere (evil/attention)"),
    "attention of a part": (_attention_of_a_part, "attention code from elsewhere (evil/attention)"),
    "attention inside a part": (_attention_inside_a_part, "attention code from elsewhere (evil/attention)"),
    "attention of another type": (_attention_of_another_type, "attn_implementation must be a text, got 3"),
    "pickled weights": (
        _pickled_weights,
        "its weights are pickled with more than tensors, and qvl runs no code from checkpoints",
    ),
}
REFUSED_TOKENIZERS = {
    "tokenizer that loads a model": (_tokenizer_that_loads_a_model, "AutoFeatureExtractor, which is no tokenizer"),
    "tokenizer of tokenizers": (_tokenizer_of_tokenizers, "RagTokenizer, which is no tokenizer"),
}


def _commands(checkpoint, tmp_path):
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, "train", 4)
    settings = {
        "model": {"path": str(checkpoint)},
        "data": {"train": str(rows)},
        "run": {"steps": 1, "batch_size": 1, "accumulation": 1, "device": "cpu"},
        "output": {"directory": str(tmp_path / "out"), "progress": False},
    }
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    return {
        "inspect": ["inspect", str(checkpoint)],
        "verify": ["verify", str(checkpoint)],
        "verify --spec": ["verify", str(digits.CHECKPOINT), "--spec", str(checkpoint)],
        "generate": ["generate", "--model", str(checkpoint), "--prompt", "Hi", "--max-new-tokens", "2"],
        "generate --stock": [
            "generate",
            "--stock",
            "--model",
            str(checkpoint),
            "--prompt",
            "Hi",
            "--max-new-tokens",
            "2",
        ],
        "quantize": ["quantize", "--model", str(checkpoint), "--out", str(tmp_path / "packed")],
        "train": ["train", str(tmp_path / "train.yaml")],
    }


@pytest.mark.parametrize("kind", [*REFUSED, *REFUSED_TOKENIZERS])
def test_commands_refuse_code(kind, checkpoint, marker, tmp_path, capsys):
    damage, message = {**REFUSED, **REFUSED_TOKENIZERS}[kind]
    damage(checkpoint)
    for name, arguments in _commands(checkpoint, tmp_path).items():
        if kind in REFUSED_TOKENIZERS and name.split()[0] not in ("generate", "train"):
            continue
        if kind == "pickled weights" and name in ("inspect", "verify --spec"):  # they read no weights
            continue
        assert cli.main(arguments) == 2, name
        error = capsys.readouterr().err
        assert not marker.exists(), f"{name} ran code of the checkpoint"
        assert "qvl: " in error and message in error, f"{name}: {error}"
        assert "huggingface.co" not in error and "hf.co" not in error and "Traceback" not in error, f"{name}: {error}"


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind.startswith("attention")])
@pytest.mark.parametrize("path", [digits.CHECKPOINT, digits.checkpoint("qvl-tiny")], ids=lambda path: path.name)
def test_from_pretrained_refuses_attention_code(kind, path, tmp_path):
    damage, message = REFUSED[kind]
    shutil.copytree(path, tmp_path / "checkpoint")
    if "inside" in kind and "vision_config" not in (tmp_path / "checkpoint" / "config.json").read_text():
        return
    damage(tmp_path / "checkpoint")
    model_class = pretrained._class_of(pretrained.load_config(path))
    with pytest.raises(ValueError, match=re.escape(message)):
        model_class.from_pretrained(tmp_path / "checkpoint")
    assert model_class.from_pretrained(tmp_path / "checkpoint", attn_implementation="eager") is not None
    adapter = {
        "base_model_name_or_path": str(tmp_path / "checkpoint"),
        "peft_type": "LORA",
        "target_modules": ["q_proj"],
    }
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match=re.escape(message)):
        model_class.from_pretrained(tmp_path / "adapter")


def test_code_beside_a_known_model_is_left_alone(checkpoint, marker, tmp_path, capsys):
    """transformers has the classes itself, so the checkpoint loads as if its code were not there."""
    _everything_names_code(checkpoint)
    for name, arguments in _commands(checkpoint, tmp_path).items():
        assert cli.main(arguments) == 0, f"{name}: {capsys.readouterr().err}"
        assert not marker.exists(), f"{name} ran code of the checkpoint"
    for directory in (tmp_path / "packed", tmp_path / "out" / "final"):
        assert cli.main(["generate", "--model", str(directory), "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
    pretrained.load(tmp_path / "packed").generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    assert not marker.exists()


def test_the_drop_in_class_runs_no_code(checkpoint, marker):
    _everything_names_code(checkpoint)
    model = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(checkpoint)
    plain = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(digits.CHECKPOINT)
    ids = torch.tensor([[5, 9, 40]])
    assert torch.equal(model.generate(ids, max_new_tokens=3), plain.generate(ids, max_new_tokens=3))
    assert not marker.exists()
    # The caller's value is passed to transformers.
    qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, trust_remote_code=True)
    assert marker.exists()


def test_a_tokenizer_of_its_own_is_refused(checkpoint, marker):
    """transformers has no tokenizer for QVL, so it would use the checkpoint's code."""
    _its_own_tokenizer(checkpoint)
    shutil.copy(digits.SHIPPED["qvl-tiny"] / "config.json", checkpoint)
    with pytest.raises(ValueError, match="tokenizer .* is Python code in the checkpoint .* qvl runs no code") as caught:
        load_tokenizer(checkpoint)
    assert not marker.exists() and "hf.co" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "chat template"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('no') }}", "chat template"),
    ],
    ids=["classes", "globals", "files", "exception"],
)
@pytest.mark.parametrize("name", digits.SHIPPED)
def test_chat_templates_are_sandboxed(template, message, name, tmp_path, capsys):
    checkpoint = shutil.copytree(digits.SHIPPED[name], tmp_path / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(template)
    assert cli.main(["generate", "--model", str(checkpoint), "--prompt", "Hi", "--max-new-tokens", "2"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1


def test_a_pickle_among_the_checkpoints_of_a_run_is_refused(tmp_path, marker, capsys):
    arguments = _commands(digits.CHECKPOINT, tmp_path)["train"]
    settings = json.loads((tmp_path / "train.yaml").read_text())
    settings["output"] |= {"save_every": 1, "log_every": 1}
    settings["run"]["steps"] = 2
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    assert cli.main(arguments) == 0
    (tmp_path / "out" / "run.json").write_text(
        (tmp_path / "out" / "run.json").read_text().replace('"steps": 2', '"steps": 3')
    )
    (tmp_path / "out" / "finished.json").unlink()  # as if it had been killed before its end
    settings["run"]["steps"] = 3
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    last = tmp_path / "out" / "checkpoint-2"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (last / name).write_bytes(pickle.dumps(_Pickled(marker)))
    assert cli.main(arguments) == 2
    assert not marker.exists()
    error = capsys.readouterr().err
    assert "checkpoint-2" in error and "Traceback" not in error


def test_a_data_set_with_a_script_is_refused(tmp_path, marker):
    directory = tmp_path / "rows"
    _write_code(directory / "rows.py", marker)
    with pytest.raises(training.DataError, match="rows.py .*qvl runs no code"):
        training.open_rows(str(directory))
    assert not marker.exists()


@pytest.mark.parametrize(
    "missing",
    [
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "generation_config.json",
    ],
)
def test_nothing_is_fetched_for_a_missing_file(missing, checkpoint, tmp_path, capsys):
    """Neither the user's cache nor the environment sets offline mode."""
    (checkpoint / missing).unlink()
    for name, arguments in _commands(checkpoint, tmp_path).items():
        cli.main(arguments)
        error = capsys.readouterr().err
        assert "huggingface.co" not in error and "hf.co" not in error and "Traceback" not in error, f"{name}: {error}"


def test_yes_in_a_process_of_its_own(checkpoint, marker):
    _another_model(checkpoint)
    done = subprocess.run(
        [sys.executable, "-m", "qvl_model.cli", "inspect", str(checkpoint)],
        input="yes\n" * 100,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and not marker.exists()
    assert "qvl runs no code from checkpoints" in done.stderr and "hf.co" not in done.stderr


@pytest.mark.parametrize("package", ["qvl_model", "bench"])
def test_every_call_that_loads_says_so(package):
    """from_pretrained of anything, and from_config of the Auto classes, with trust_remote_code=False; torch.load of
    tensors only.
    """
    wrong, seen = [], 0
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            loads = node.func.attr in ("from_pretrained", "get_processor_dict") or (
                node.func.attr == "from_config" and owner.startswith("Auto")
            )
            if loads and owner not in OUR_OWN:
                seen += 1
                given = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "trust_remote_code"]
                unpacked = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
                if given != ["False"] and not any("'trust_remote_code': False" in value for value in unpacked):
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}")
            if f"{owner}.{node.func.attr}" in ("torch.load", "pickle.load", "pickle.loads"):
                if not any(
                    keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords
                ):
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert seen > 4 and not wrong, "\n".join(wrong)
