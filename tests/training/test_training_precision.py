"""fp16 with loss scaling, on a machine without a GPU: flags are tested with a fake GPU, loss scaling with a scaler on
the CPU.
"""

import math

import pytest
import torch
from training_data import settings
from transformers import AutoModelForImageTextToText, TrainingArguments

from qvl_model import training
from qvl_model.training import TrainConfig
from qvl_model.training import run as training_run


@pytest.mark.parametrize(
    "precision, cuda, flags",
    [
        ("auto", True, (True, False)),
        ("fp16", True, (True, False)),
        ("bf16", True, (False, True)),
        ("fp32", True, (False, False)),
        ("auto", False, (False, True)),
        ("bf16", False, (False, True)),
        ("fp32", False, (False, False)),
    ],
)
@pytest.mark.parametrize("device", ["auto", "the named one"])
def test_flags(monkeypatch, precision, cuda, flags, device):
    given: dict = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)

    class Arguments(TrainingArguments):
        def __init__(self, **options):
            given.update(options)

    monkeypatch.setattr(training_run, "TrainingArguments", Arguments)
    run = {"steps": 1, "precision": precision, "device": "auto" if device == "auto" else "cuda" if cuda else "cpu"}
    config = TrainConfig.from_dict({"data": {"train": "rows.jsonl"}, "run": run, "output": {"directory": "out"}})
    training.build_arguments(config, torch.nn.Linear(1, 1))
    assert ((given["fp16"], given["bf16"]), given["use_cpu"]) == (flags, not cuda)


class Scaler(torch.amp.GradScaler):
    """PyTorch's scaler on the CPU, which records its calls."""

    def __init__(self, **options):
        super().__init__("cpu", **options)
        self.calls: list[str] = []

    def scale(self, outputs):
        self.calls.append("scale")
        return super().scale(outputs)

    def unscale_(self, optimizer):
        self.calls.append("unscale")
        return super().unscale_(optimizer)

    def step(self, optimizer, *args, **kwargs):
        self.calls.append("step")
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale=None):
        self.calls.append("update")
        return super().update(new_scale)


class OnCPU(TrainingArguments):
    def __init__(self, **options):
        super().__init__(**{**options, "use_cpu": True})


def _fp16(monkeypatch, scaler: Scaler) -> None:
    """Makes fp16 runs take their whole path on the CPU, with a fake GPU and this scaler."""
    build = training_run.build_arguments

    def arguments(*args, **kwargs):
        with monkeypatch.context() as fake:
            fake.setattr(torch.cuda, "is_available", lambda: True)
            fake.setattr(training_run, "TrainingArguments", OnCPU)
            return build(*args, **kwargs)

    class Scaling(training.Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            assert self.accelerator.mixed_precision == "fp16"
            self.accelerator.scaler, self.accelerator.native_amp = scaler, True  # as accelerate sets them on a GPU

    monkeypatch.setattr(training_run, "_device_and_precision", lambda config: (True, "fp16"))
    monkeypatch.setattr(training_run, "build_arguments", arguments)
    monkeypatch.setattr(training_run, "Trainer", Scaling)


def _train(directory, name, precision):
    run = {"steps": 3, "precision": precision, "device": "cpu" if precision == "fp32" else "auto"}
    training.train(
        TrainConfig.from_dict(settings(directory, "qvl", run=run, output={"directory": str(directory / name)}))
    )
    return [entry for entry in training.read_log(directory / name) if "loss" in entry]


def test_scaled_losses(monkeypatch, tmp_path):
    """Backward starts from the scaled loss, gradients are unscaled before they are clipped, the scale is in the
    checkpoint.
    """
    scaler, plain = Scaler(init_scale=2.0**10), _train(tmp_path, "fp32", "fp32")
    _fp16(monkeypatch, scaler)
    scaled = _train(tmp_path, "fp16", "fp16")
    assert scaler.calls == ["scale", "unscale", "step", "update"] * 3
    for key in ("loss", "grad_norm"):
        one, other = ([entry[key] for entry in log] for log in (scaled, plain))
        assert one == pytest.approx(other, rel=2e-2) and one != other and len(one) == 3
    assert torch.load(tmp_path / "fp16" / "checkpoint-3" / "scaler.pt", weights_only=True)["scale"] == 2.0**10


def test_an_overflow_skips_the_step_and_lowers_the_scale(monkeypatch, tmp_path):
    scaler = Scaler(init_scale=2.0**100, backoff_factor=2.0**-90)
    _fp16(monkeypatch, scaler)
    log = _train(tmp_path, "overflow", "fp16")
    assert all(math.isfinite(entry["loss"]) for entry in log) and scaler.get_scale() == 2.0**10
    assert [entry["learning_rate"] for entry in log] == pytest.approx([0, 0, 0.0015])  # the schedule waits too
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "overflow" / "final")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
