"""A typed user program that calls the public functions; `make lint` checks it with mypy's strict settings."""

from pathlib import Path
from typing import assert_type

import torch
from transformers import Qwen3VLForConditionalGeneration

import qvl_kernels
import qvl_model
from qvl_kernels.quant import QuantizedWeight, quantize
from qvl_model import capacity, training


def kernels(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert_type(qvl_kernels.__version__, str)
    normed = assert_type(qvl_kernels.rms_norm(x, weight[0], eps=1e-6), torch.Tensor)
    gated = assert_type(qvl_kernels.swiglu(normed, qvl_kernels.linear(normed, weight)), torch.Tensor)
    quantized = assert_type(quantize(weight, bits=4, group=32), QuantizedWeight)
    with qvl_kernels.use_backend("reference"):
        out = assert_type(qvl_kernels.quantized_linear(gated, quantized), torch.Tensor)
    reasons: list[str] = qvl_kernels.fallbacks()
    print(reasons, qvl_kernels.cpu_info()["isa"], qvl_kernels.backends()["cpp"]["available"])
    return assert_type(qvl_kernels.linear_cross_entropy(out, weight, labels, reduction="mean"), torch.Tensor)


def stock_model(path: Path) -> None:
    model = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16)
    model = assert_type(qvl_model.accelerate(model, weights="int8"), Qwen3VLForConditionalGeneration)
    if qvl_model.is_accelerated(model):
        print(assert_type(qvl_model.report(model), qvl_model.Report).replaced)
    print(capacity.verify(model, "qwen3-vl-2b"))
    qvl_model.release(model)
    assert_type(qvl_model.restore(model), Qwen3VLForConditionalGeneration)


def own_classes(path: Path) -> None:
    drop_in = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(path)
    assert_type(drop_in, qvl_model.Qwen3VLForConditionalGeneration)
    config = assert_type(qvl_model.QVLConfig.from_preset("qvl-tiny"), qvl_model.QVLConfig)
    assert_type(
        qvl_model.accelerate(qvl_model.QVLForConditionalGeneration(config)), qvl_model.QVLForConditionalGeneration
    )


def train(file: str) -> Path:
    config = training.TrainConfig.from_yaml(file)
    assert_type(config.run.steps, int | None)
    return assert_type(training.train(config), training.TrainResult).directory
