"""How a training run ends: finished, by a signal, without disk space, with a lost loss; and where it may go on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import models
import pytest
import torch
from training_data import settings, tiny_checkpoint
from transformers import TrainingArguments

from qvl_model import cli, training
from qvl_model.training import TrainConfig


def _config(shared, out, **groups):
    groups["output"] = {"directory": str(out), **groups.get("output", {})}
    return settings(shared, **groups)


def _train(shared, out, **groups):
    return training.train(TrainConfig.from_dict(_config(shared, out, **groups)))


def _losses(directory):
    return [entry["loss"] for entry in training.read_log(directory) if "loss" in entry]


def _contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ends")
    _train(directory, directory / "plain")
    return directory


def test_a_finished_run_stays_as_it_is(shared, tmp_path, capsys):
    """Also where the last checkpoint is older than the last step."""
    out = tmp_path / "out"
    first = _train(shared, out, run={"steps": 4})
    before = _contents(out)
    again = _train(shared, out, run={"steps": 4})
    assert _contents(out) == before and again.directory == first.directory and again.steps == first.steps == 4
    assert "is finished; nothing is changed" in capsys.readouterr().err
    with pytest.raises(training.ConfigError, match="checkpoints of another run: run.steps"):
        _train(shared, out, run={"steps": 5})
    assert _contents(out) == before


def test_a_run_goes_on_beside_another_installation(shared, tmp_path):
    """The checkpoint that it began with may lie elsewhere, but must be the same."""
    elsewhere = shutil.copytree(shared, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("plain"))
    out = shutil.copytree(shared / "plain", tmp_path / "out")
    (out / "finished.json").unlink()
    shutil.rmtree(out / "checkpoint-6")
    result = training.train(TrainConfig.from_dict(_config(elsewhere, out)))
    assert result.resumed_from == 3 and _losses(out) == _losses(shared / "plain")
    record = json.loads((out / "run.json").read_text())
    assert str(shared) not in json.dumps(record) and str(elsewhere) not in json.dumps(record)
    record["model"]["path"] = _config(elsewhere, out)["model"]["path"]  # as earlier versions wrote it
    (out / "run.json").write_text(json.dumps(record))
    assert training.train(TrainConfig.from_dict(_config(elsewhere, out))).steps == 6
    (out / "finished.json").unlink()
    other = tiny_checkpoint(tmp_path / "other", "qwen3_vl")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(training.ConfigError, match="checkpoints of another run: model.path"):
        training.train(TrainConfig.from_dict(_config(elsewhere, out, model={"path": str(other)})))


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_sigterm_writes_a_checkpoint(shared, tmp_path):
    out = tmp_path / "out"
    groups = {"run": {"steps": 200}, "output": {"save_every": 1000}}
    (tmp_path / "train.yaml").write_text(json.dumps(_config(shared, out, **groups)))
    command = [sys.executable, "-m", "qvl_model.cli", "train", str(tmp_path / "train.yaml")]
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while len(_losses(out)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped after step" in error and "Traceback" not in error, error
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert 5 <= step < 200 and len(_losses(out)) == step and not (out / "final").exists()
    assert training.last_complete(out) == (checkpoint, [])
    groups["run"]["steps"] = 200
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"going on from {checkpoint}" in done.stderr
    assert len(_losses(out)) == 200 and (out / "final" / "config.json").is_file()


def test_a_lost_loss_stops_the_run(shared, tmp_path, capsys):
    """At the step; the checkpoint before it stays, and nothing is written after it."""
    out = tmp_path / "out"
    good = _train(shared, out, run={"steps": 3})
    assert good.steps == 3
    shutil.rmtree(out)
    groups = {"run": {"steps": 40}, "optimizer": {"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup": 0.0}}
    config = _config(shared, out, **groups, output={"save_every": 1})
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    assert cli.main(["train", str(tmp_path / "train.yaml")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("qvl: the loss is not finite at step") and "learning_rate" in error
    step = int(error.split("at step ")[1].split(";")[0])
    assert not (out / f"checkpoint-{step}").exists() and not (out / "final").exists()
    last, incomplete = training.last_complete(out)
    assert incomplete == [] and (last is None or int(last.name.partition("-")[2]) < step)


def test_weights_that_are_lost_are_not_saved(tmp_path):
    model = models.stock_model("small")
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = training.Trainer(model=model, args=arguments)
    with torch.no_grad():
        model.model.language_model.norm.weight[3] = float("nan")
    with pytest.raises(training.Diverged, match="a weight is not finite at step 0"):
        trainer._save_checkpoint(model, None)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_full_disk(shared, tmp_path, monkeypatch, capsys):
    """No half checkpoint stays, and the run goes on once there is room."""
    out = tmp_path / "out"
    (tmp_path / "train.yaml").write_text(json.dumps(_config(shared, out)))
    save = training.Trainer._save_rng_state

    def full(self, folder):
        if folder.endswith("-6"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, folder)

    monkeypatch.setattr(training.Trainer, "_save_rng_state", full)
    assert cli.main(["train", str(tmp_path / "train.yaml")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"qvl: the disk is full ({out})"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.setattr(training.Trainer, "_save_rng_state", save)
    assert cli.main(["train", str(tmp_path / "train.yaml")]) == 0
    assert _losses(out) == _losses(shared / "plain")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"data": {"train": "/no/such.jsonl"}}, "does not exist"),
        ({"run": {"precision": "fp16", "device": "cpu"}}, "needs a GPU"),
        ({"run": {"device": "cuda"}}, "finds no GPU"),
        ({"model": {"path": "/no/such"}}, "no config.json"),
    ],
    ids=["data", "precision", "device", "model"],
)
def test_mistakes_come_before_the_directory(shared, tmp_path, groups, message):
    if groups.get("run", {}).get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((training.ConfigError, training.DataError), match=message):
        _train(shared, tmp_path / "out", **groups)
    assert not (tmp_path / "out").exists()


def test_keys_need_no_optional_package():
    code = (
        "import sys\n"
        "for name in ('accelerate', 'datasets', 'sklearn', 'tensorboard'): sys.modules[name] = None\n"
        "from qvl_model import cli\n"
        "sys.exit(cli.main(['train', '--keys']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "learning_rate" in done.stdout, done.stderr
