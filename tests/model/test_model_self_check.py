"""Untested transformers versions: a small model is tried first, and if it differs the model stays stock."""

import random
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import models
import numpy as np
import pytest
import qvl_models
import torch
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

import qvl_model
from qvl_model import pretrained, self_check
from qvl_model.compat import TESTED_TRANSFORMERS
from qvl_model.modules import fast_path, text
from qvl_model.quantization.modules import PackedLinear

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def untested(monkeypatch):
    monkeypatch.setattr(self_check.transformers, "__version__", "5.99.0")
    monkeypatch.setattr(self_check, "_known", {})


def _parts():
    whole = models.stock_model("small")
    return {"whole": whole, "text": whole.model.language_model, "vision": whole.model.visual, "inner": whole.model}


@pytest.mark.parametrize(
    "make",
    [
        *(lambda part=part: _parts()[part] for part in _parts()),
        qvl_models.plain_model,
        lambda: models.stock_model("odd", torch.bfloat16, attention="eager"),
    ],
    ids=[*_parts(), "qvl", "eager"],
)
def test_a_version_that_changes_nothing_is_accelerated(untested, make):
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert qvl_model.is_accelerated(qvl_model.accelerate(model))
    assert list(self_check._known.values()) == [None]


def test_the_check_runs_once_and_leaves_no_trace(untested, monkeypatch):
    made = []
    monkeypatch.setattr(
        self_check, "_small_model", lambda config, make=self_check._small_model: made.append(config) or make(config)
    )
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            qvl_model.accelerate(MODEL)
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu") and torch.empty(1).is_meta
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert (
        torch.equal(torch.get_rng_state(), states[0])
        and random.getstate() == states[1]
        and np.random.get_state()[1].tolist() == states[2]
    )
    qvl_model.accelerate(models.stock_model("small"))
    assert len(made) == 1


MODEL = models.stock_model("small")


def test_other_results_keep_the_model_stock(untested, monkeypatch):
    """Simulates a version whose norms store eps elsewhere, which our subclass does not know."""
    monkeypatch.setattr(stock.Qwen3VLTextRMSNorm, "forward", lambda self, x: x * 1.01 * self.weight)
    monkeypatch.setattr(fast_path, "stock_is_patched", lambda: False)  # it is this version's own
    model = models.stock_model("small")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.warns(UserWarning, match=r"5\.99\.0.*logits of a prompt differ") as caught:
        assert qvl_model.accelerate(model, weights="int8") is model
    assert len(caught) == 1 and {name: type(module) for name, module in model.named_modules()} == before


def test_wrong_tokens_alone_are_seen(untested, monkeypatch):
    monkeypatch.setattr(
        text.Qwen3VLTextRMSNorm,
        "forward",
        lambda self, x: stock.Qwen3VLTextRMSNorm.forward(self, x) * (1.01 if x.shape[1] == 1 else 1),
    )
    monkeypatch.setattr("qvl_model.modules.decoder_layer.FusedLayer.of", lambda layer: None)
    with pytest.warns(UserWarning, match="logits of tokens differ"):
        assert not qvl_model.is_accelerated(qvl_model.accelerate(models.stock_model("small")))


OPTIONS = [
    {"weights": "int8"},
    {"weights": "int4"},
    {"weights": {"vision": "int8"}},
    {"weights": "int4", "group": 32},
    {"mlp_rows": 3},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_options_have_a_check_of_their_own(untested, dtype):
    for options in ({}, *OPTIONS):
        model = models.stock_model("small", dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert qvl_model.is_accelerated(qvl_model.accelerate(model, **options)), options
    qvl_model.accelerate(models.stock_model("odd", dtype))
    assert len(self_check._known) == len(OPTIONS) + 2 and set(self_check._known.values()) == {None}


def test_quantised_layers_are_checked_too(untested, monkeypatch):
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: forward(self, x) * 1.5)
    monkeypatch.setattr("qvl_model.modules.decoder_layer.FusedLayer.of", lambda layer: None)
    model = models.stock_model("small")
    with pytest.warns(UserWarning, match="differ"):
        assert not qvl_model.is_accelerated(qvl_model.accelerate(model, weights="int8"))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_quantised_checkpoints_do_not_become_stock(untested, monkeypatch, tmp_path):
    """There is no stock model that could run their weights."""
    with monkeypatch.context() as patch:
        patch.setattr(self_check.transformers, "__version__", TESTED_TRANSFORMERS[-1])
        saved = qvl_model.accelerate(models.stock_model("small"), weights="int8")
        saved.save_pretrained(tmp_path)
    assert qvl_model.is_accelerated(saved)
    assert qvl_model.is_accelerated(pretrained.load(tmp_path))
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(stock.Qwen3VLTextRMSNorm, "forward", lambda self, x: x * 1.5 * self.weight)
    with pytest.raises(ValueError, match=r"only qvl's layers can run quantised weights.*5\.99\.0"):
        pretrained.load(tmp_path)


FUTURE = r"""
import importlib.util, re, sys, time, warnings
import torch, transformers
name = "transformers.models.qwen3_vl.modeling_qwen3_vl"
source = re.sub(r"\bposition_embeddings\b", "rotary", open(importlib.util.find_spec(name).origin).read())
open({path!r}, "w").write(source)
spec = importlib.util.spec_from_file_location(name, {path!r})
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["transformers"].__version__ = "5.99.0"
sys.path.insert(0, {tests!r})
import models, qvl_model
model, batch = models.stock_model("small"), models.inputs([4, (1, 4, 4), 3])
expected = model.generate(**batch, max_new_tokens=4)
started = time.perf_counter()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    qvl_model.accelerate(model)
assert time.perf_counter() - started < 5
messages = [str(w.message) for w in caught if "stays stock" in str(w.message)]
assert not qvl_model.is_accelerated(model) and torch.equal(model.generate(**batch, max_new_tokens=4), expected)
assert len(messages) == 1 and "5.99.0" in messages[0] and "TypeError" in messages[0], messages
"""


def test_a_future_version_with_a_renamed_argument(tmp_path):
    code = textwrap.dedent(FUTURE).format(path=str(tmp_path / "future.py"), tests=str(ROOT / "tests" / "helpers"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
