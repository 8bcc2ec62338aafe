"""Training runs of a tiny model: loss curves, resuming after kill -9, ranks, precision, capacity, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import models
import psutil
import pytest
import torch
from training_data import settings, tiny_checkpoint, write_rows
from transformers import (
    AutoModelForImageTextToText,
    Qwen3VLForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

import qvl_model
from qvl_model import capacity, cli, pretrained, training
from qvl_model.quantization.convert import formats_of
from qvl_model.training import TrainConfig, checkpoints


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A directory with the tiny checkpoint and its data, and the losses of an uninterrupted run of ``settings``."""
    directory = tmp_path_factory.mktemp("training")
    training.train(TrainConfig.from_dict(settings(directory, output={"directory": str(directory / "plain")})))
    return directory


def _losses(directory):
    return [entry["loss"] for entry in training.read_log(directory) if "loss" in entry]


def _train(shared, out, **groups):
    groups["output"] = {"directory": str(out), **groups.get("output", {})}
    result = training.train(TrainConfig.from_dict(settings(shared, **groups)))
    return _losses(out), result


def test_a_run(shared, tmp_path):
    losses = _losses(shared / "plain")
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    assert sorted(path.name for path in (shared / "plain").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    for directory in ("checkpoint-6", "final"):
        assert (shared / "plain" / directory / "model.safetensors").is_file()
        assert (shared / "plain" / directory / "preprocessor_config.json").is_file()
    config = json.loads((shared / "plain" / "final" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"] and config["dtype"] == "bfloat16"
    model = Qwen3VLForConditionalGeneration.from_pretrained(shared / "plain" / "final", dtype="auto")
    trained = Qwen3VLForConditionalGeneration.from_pretrained(shared / "plain" / "checkpoint-6")
    for (name, final), kept in zip(model.named_parameters(), trained.parameters(), strict=True):
        assert final.dtype == torch.bfloat16 and kept.dtype == torch.float32 and torch.equal(final, kept.bfloat16()), (
            name
        )


def test_the_same_again(shared, tmp_path):
    assert _train(shared, tmp_path)[0] == _losses(shared / "plain")


CHANGES = {
    "stock": {"model": {"accelerate": False}},
    "gradient checkpointing": {"run": {"gradient_checkpointing": True}},
    "accumulation": {"run": {"batch_size": 2, "accumulation": 2}},
    "workers": {"run": {"workers": 1}},
}


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=[pytest.mark.slow] if name == "workers" else []) for name in CHANGES]
)
def test_what_must_not_change_the_curve(shared, tmp_path, change):
    losses, _ = _train(shared, tmp_path, **CHANGES[change])
    assert losses == pytest.approx(_losses(shared / "plain"), rel=2e-5)


def test_dropout_and_bf16_change_it(shared, tmp_path):
    plain = _losses(shared / "plain")
    dropout, _ = _train(shared, tmp_path / "dropout", model={"attention_dropout": 0.3})
    bf16, _ = _train(shared, tmp_path / "bf16", run={"precision": "bf16"})
    for losses, largest in ((dropout, 0.5), (bf16, 0.05)):
        differences = [abs(a - b) for a, b in zip(losses, plain, strict=True)]
        assert 1e-6 < max(differences) < largest


def _command(config: dict, directory: Path, ranks: int = 1) -> list[str]:
    file = directory / "train.yaml"
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config))  # JSON is YAML
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [sys.executable, *launcher, "-m", "qvl_model.cli", "train", str(file)]


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def _kill_in_the_middle(command: list[str], out: Path, step: int) -> None:
    """Starts the command, and kills it and its children with SIGKILL once ``step`` is in the log."""
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while len(_losses(out)) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    ended = process.poll()
    ranks = psutil.Process(process.pid).children(recursive=True) if ended is None else []
    for started in (process, *ranks):
        started.kill()
    _, error = process.communicate(timeout=60)
    assert ended is None, f"ended before step {step}: {error.decode()[-2000:]}"
    assert process.returncode == -signal.SIGKILL
    psutil.wait_procs(ranks, timeout=60)


def test_resume_after_kill(shared, tmp_path):
    """Dropout is on, so the random state must be restored too; over several epochs."""
    groups = {
        "model": {"attention_dropout": 0.1},
        "run": {"steps": 60},
        "output": {"save_every": 5, "capacity_every": 50},
    }
    whole, _ = _train(shared, tmp_path / "whole", **groups)
    out = tmp_path / "killed"
    config = settings(shared, **{**groups, "output": {**groups["output"], "directory": str(out)}})
    _kill_in_the_middle(_command(config, tmp_path), out, 13)
    before = _losses(out)
    assert 13 <= len(before) < 60 and before == whole[: len(before)]
    result = training.train(TrainConfig.from_dict(config))
    assert 10 <= result.resumed_from < 60 and result.steps == 60
    assert _losses(out) == whole
    assert [entry["step"] for entry in training.read_log(out)] == list(range(1, 61))
    for ours, theirs in zip(
        *(
            AutoModelForImageTextToText.from_pretrained(path / "final").parameters()
            for path in (out, tmp_path / "whole")
        )
    ):
        assert torch.equal(ours, theirs)


def test_checkpoints_that_were_not_finished_are_left_out(shared, tmp_path, capfd):
    """Killed while writing: weights exist, and the state that is written last is missing or truncated."""
    shutil.copytree(shared / "plain", tmp_path / "out")
    newest = tmp_path / "out" / "checkpoint-6"
    state = (newest / "trainer_state.json").read_text()
    (newest / "trainer_state.json").write_text(state[: len(state) // 2])
    assert training.last_complete(tmp_path / "out") == (tmp_path / "out" / "checkpoint-3", [newest])
    losses, result = _train(shared, tmp_path / "out")
    assert result.resumed_from == 3 and losses == _losses(shared / "plain")
    assert "checkpoint-6 was not written to its end" in capfd.readouterr().err


def test_a_finished_run_is_not_repeated(shared, tmp_path):
    shutil.copytree(shared / "plain", tmp_path / "out")
    losses, result = _train(shared, tmp_path / "out")
    assert result.resumed_from == result.steps == 6 and losses == _losses(shared / "plain")


def test_one_process_at_a_time(shared, tmp_path):
    with checkpoints.locked(tmp_path), pytest.raises(training.ConfigError, match="another process trains into"):
        _train(shared, tmp_path)


def test_another_run_is_not_resumed(shared, tmp_path):
    shutil.copytree(shared / "plain", tmp_path / "out")
    with pytest.raises(
        training.ConfigError, match=r"optimizer.learning_rate \(0.003 then, 0.1 now\); run.steps \(6 then, 9 now\)"
    ):
        _train(shared, tmp_path / "out", optimizer={"learning_rate": 0.1}, run={"steps": 9})
    write_rows(tmp_path / "other" / "train.jsonl", "train", 24, seed=5)
    with pytest.raises(training.ConfigError, match="rows.train"):
        _train(shared, tmp_path / "out", data={"train": str(tmp_path / "other" / "train.jsonl")})


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_are_one(shared, tmp_path, sharding):
    """Two gloo ranks with half the batch each: the losses of one rank, and a model that loads; FSDP2 gathers and saves
    shards.
    """
    out = tmp_path / "out"
    validation = write_rows(tmp_path / "validation.jsonl", "held_out", 8)
    config = settings(
        shared,
        data={"validation": str(validation)},
        run={"batch_size": 2, "sharding": sharding},
        output={"directory": str(out)},
    )
    done = subprocess.run(
        _command(config, tmp_path, ranks=2), env=_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert _losses(out) == pytest.approx(_losses(shared / "plain"), rel=1e-5)
    evaluated = [entry["eval_loss"] for entry in training.read_log(out) if "eval_loss" in entry]
    assert len(evaluated) == 2 and 0 < evaluated[1] < evaluated[0]
    assert (out / "checkpoint-6" / "pytorch_model_fsdp.bin").is_file() == (sharding == "fsdp")
    ours, theirs = (Qwen3VLForConditionalGeneration.from_pretrained(path / "final") for path in (out, shared / "plain"))
    assert capacity.verify(ours).ok
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp in bf16", "some rows without images"])
def test_two_ranks_are_one_also(shared, tmp_path, kind):
    groups = {"run": {"gradient_checkpointing": True}}
    if kind == "fsdp in bf16":
        groups["run"] |= {"precision": "bf16", "sharding": "fsdp"}
    else:  # a rank may get a batch without images, so its vision tower has no gradient
        data = shutil.copytree(shared / "data", tmp_path / "data")
        rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
        text = [
            json.dumps({key: value for key, value in row.items() if key != "image" or i % 3 == 0})
            for i, row in enumerate(rows)
        ]
        (data / "train.jsonl").write_text("\n".join(text))
        groups["data"] = {"train": str(data / "train.jsonl")}
    expected, _ = _train(shared, tmp_path / "one", **{**groups, "run": {**groups["run"], "sharding": "ddp"}})
    groups["run"]["batch_size"] = 2
    config = settings(shared, **groups, output={"directory": str(tmp_path / "two")})
    done = subprocess.run(
        _command(config, tmp_path, ranks=2), env=_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = _losses(tmp_path / "two")
    assert losses == pytest.approx(expected, rel=2e-3 if "bf16" in kind else 1e-5)
    assert all(loss != torch.tensor(loss).bfloat16().item() for loss in losses), "the loss itself was rounded to bf16"


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_resume_after_kill(shared, tmp_path, sharding):
    groups = {"model": {"attention_dropout": 0.1}, "run": {"steps": 40, "batch_size": 2, "sharding": sharding}}
    curves = []
    for name in ("whole", "killed"):
        out = tmp_path / name
        config = settings(shared, **groups, output={"directory": str(out), "save_every": 5})
        command = _command(config, tmp_path / f"{name}-config", ranks=2)
        if name == "killed":
            _kill_in_the_middle(command, out, 8)
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("going on from" in done.stderr) == (name == "killed")
        curves.append(_losses(out))
    assert curves[0] == curves[1] and len(curves[0]) == 40


def test_validation_and_tensorboard(shared, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    validation = write_rows(tmp_path / "data" / "validation.jsonl", "held_out", 6)
    losses, _ = _train(shared, tmp_path / "out", data={"validation": str(validation)}, output={"tensorboard": True})
    evaluated = [
        (entry["step"], entry["eval_loss"]) for entry in training.read_log(tmp_path / "out") if "eval_loss" in entry
    ]
    assert [step for step, _ in evaluated] == [3, 6] and evaluated[1][1] < evaluated[0][1]
    assert losses == _losses(shared / "plain")
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert len(events.Scalars("eval/loss")) == 2 and len(events.Scalars("train/learning_rate")) == 6


def test_tensorboard_missing(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(training.ConfigError, match="pip install tensorboard"):
        _train(shared, tmp_path, output={"tensorboard": True})


def test_skipped_rows_are_written_down(shared, tmp_path, capfd):
    data = shutil.copytree(shared / "data", tmp_path / "data")
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join([*lines[:2], "{", *lines[2:]]) + "\n")
    losses, result = _train(shared, tmp_path / "out", data={"train": str(data / "train.jsonl")})
    assert result.skipped == 1 and losses == _losses(shared / "plain")
    assert "25 rows, 1 skipped\n  line 3: is not valid JSON" in capfd.readouterr().err
    assert (tmp_path / "out" / "skipped-train.txt").read_text().startswith("line 3: is not valid JSON")


def test_weight_decay_is_for_matrices():
    model = models.stock_model("untied_bias")
    decayed = set(training.decayed(model))
    for name, _ in model.named_parameters():
        is_norm = "norm" in name
        assert (name in decayed) == (not name.endswith("bias") and not is_norm), name
    arguments = TrainingArguments(output_dir="/tmp", report_to=[], use_cpu=True, weight_decay=0.3)
    trainer = training.Trainer(model=model, args=arguments)
    with_decay, without = trainer.create_optimizer().param_groups
    assert with_decay["weight_decay"] == 0.3 and without["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in with_decay["params"]} == decayed
    assert len(with_decay["params"]) + len(without["params"]) == len(list(model.parameters()))


def test_schedule_and_precision_arguments(shared, monkeypatch):
    model = models.stock_model("small")
    config = TrainConfig.from_dict(settings(shared, run={"precision": "auto"}, optimizer={"warmup": 0.1, "beta2": 0.9}))
    arguments = training.build_arguments(config, model)
    assert arguments.bf16 and not arguments.fp16 and arguments.get_warmup_steps(100) == 10
    assert arguments.lr_scheduler_type == "cosine" and arguments.adam_beta2 == 0.9 and arguments.optim == "adamw_torch"
    for run, message in (({"precision": "fp16"}, "needs a GPU"), ({"sharding": "fsdp"}, "torchrun")):
        with pytest.raises(training.ConfigError, match=message):
            training.build_arguments(TrainConfig.from_dict(settings(shared, run=run)), model)
    if not torch.cuda.is_available():
        with pytest.raises(training.ConfigError, match="finds no GPU"):
            training.build_arguments(TrainConfig.from_dict(settings(shared, run={"device": "cuda"})), model)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(training.ConfigError, match="images in every row"):
        training.build_arguments(
            TrainConfig.from_dict(settings(shared, run={"sharding": "fsdp"})), model, images_in_every_row=False
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="loss scaling runs on GPUs only")
def test_fp16_scales_the_loss(shared, tmp_path):
    losses, _ = _train(shared, tmp_path, run={"precision": "fp16", "device": "cuda"})
    assert losses == pytest.approx(_losses(shared / "plain"), rel=2e-2)
    scaler = torch.load(tmp_path / "checkpoint-6" / "scaler.pt", weights_only=True)
    assert scaler["scale"] > 1


def test_epochs(shared, tmp_path):
    losses, result = _train(shared, tmp_path, run={"steps": None, "epochs": 0.5})
    assert (
        result.steps == 3 and losses[:2] == _losses(shared / "plain")[:2]
    )  # the warm-up is the same, the cosine differs


def _learning_rates(directory):
    return [entry["learning_rate"] for entry in training.read_log(directory) if "loss" in entry]


def test_learning_rates(shared):
    """Warm-up over two steps, then half a cosine that reaches 0 after the sixth."""
    expected = [0, 0.0015] + [0.003 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / 4)).item()) for i in range(4)]
    assert _learning_rates(shared / "plain") == pytest.approx(expected, abs=1e-9)


class _Damage(TrainerCallback):
    def __init__(self, damage, step):
        self.damage, self.step = damage, step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.damage(model)


def _zero_head(model):
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.o_proj.weight[:, :16] = 0


def _freeze(model):
    model.model.visual.merger.linear_fc1.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_zero_head, "layers.1.self_attn.o_proj: head 0 is pruned"),
        (_freeze, "visual.merger.linear_fc1: weight is frozen"),
    ],
    ids=["pruned", "frozen"],
)
@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
def test_lost_capacity_stops_the_run(tmp_path, damage, message, accelerated):
    model = models.stock_model("small")
    if accelerated:
        model = qvl_model.accelerate(model)
    row = models.inputs([11])["input_ids"][0]
    check = training.CapacityCallback(models.config("small"), every=4)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_steps=1,
        learning_rate=0.0,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = training.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row}] * 8,
        callbacks=[_Damage(damage, 6), check],
    )
    with pytest.raises(capacity.CapacityError, match=message):
        trainer.train()
    assert trainer.state.global_step == 8 and check.checks == 3  # before the first step, after 4 and after 8
    assert training.last_complete(tmp_path)[0].name == "checkpoint-7"


def test_frozen_models_do_not_start(tmp_path):
    model = models.stock_model("small")
    model.model.visual.requires_grad_(False)
    row = models.inputs([11])["input_ids"][0]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = training.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row}],
        callbacks=[training.CapacityCallback()],
    )
    with pytest.raises(capacity.CapacityError, match="is frozen"):
        trainer.train()
    with pytest.raises(ValueError, match="at least 1 step"):
        training.CapacityCallback(every=0)


def test_unusable_checkpoints(shared, tmp_path):
    with pytest.raises(training.ConfigError, match="has no config.json"):
        _train(shared, tmp_path / "out", model={"path": str(tmp_path)})
    (tmp_path / "file").touch()
    with pytest.raises(training.ConfigError, match="output.directory: .* cannot be made"):
        _train(shared, tmp_path / "file")
    with pytest.raises(training.ConfigError, match="cannot be trained"):
        _train(shared, tmp_path / "out", model={"random_weights": False})
    quantised = tmp_path / "quantised"
    pretrained.quantize(shared / "plain" / "final", quantised, formats_of("int8"))
    with pytest.raises(training.ConfigError, match="holds quantised weights, which are not trained"):
        _train(shared, tmp_path / "out", model={"path": str(quantised)})
    broken = tiny_checkpoint(tmp_path / "broken")
    shutil.copy(shared / "plain" / "final" / "model.safetensors", broken)
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(training.ConfigError, match=r"lacks 11 of the model's weights.*layers.2"):
        _train(shared, tmp_path / "out", model={"path": str(broken), "random_weights": False})
    with pytest.raises(training.ConfigError, match="model.hidden_dropout: a qwen3_vl model has no such dropout"):
        _train(shared, tmp_path / "out", model={"hidden_dropout": 0.1})


def test_command_line(shared, tmp_path, capsys):
    """qvl train, verify (whole and pruned) and generate on what it trained."""
    config = settings(shared, output={"directory": str(tmp_path / "out")}, run={"steps": 1})
    _command(config, tmp_path)
    assert cli.main(["train", str(tmp_path / "train.yaml")]) == 0
    final = tmp_path / "out" / "final"
    assert f"1 steps; the model is in {final}" in capsys.readouterr().out
    assert cli.main(["verify", str(final)]) == 0
    assert "capacity is complete" in capsys.readouterr().out
    assert cli.main(["verify", str(final), "--spec", str(shared / "qwen3_vl")]) == 0
    assert cli.main(["verify", str(final), "--spec", "qwen3-vl-2b"]) == 1
    assert "model.language_model.layers: has 2 entries, the specification says 28" in capsys.readouterr().out
    assert cli.main(["verify", str(final), "--spec", "nonsense"]) == 2
    assert "neither one of qwen3-vl-2b" in capsys.readouterr().err
    assert cli.main(["generate", "--model", str(final), "--prompt", "Hi", "--max-new-tokens", "2"]) == 0


def test_verify_reads_what_is_in_the_file(shared, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(shared / "plain" / "final", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    prefix = "model.language_model.layers."
    weights[f"{prefix}0.mlp.up_proj.weight"][7] = 0
    del weights[f"{prefix}1.self_attn.q_norm.weight"]
    weights[f"{prefix}2.mlp.up_proj.weight"] = weights[f"{prefix}1.mlp.up_proj.weight"].clone()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["verify", str(broken)]) == 1
    out = capsys.readouterr().out
    assert f"{prefix}0.mlp.up_proj: output channel 7 of 48 is all zero" in out
    assert f"{prefix}1.self_attn.q_norm: weight is not in the checkpoint" in out
    assert f"{prefix}2.mlp.up_proj: weight is in the checkpoint, and config.json has no place for it" in out
    assert "3 violations" in out
