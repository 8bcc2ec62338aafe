"""accelerate chooses between our CPU kernels and PyTorch's by the sizes of the model, and report shows the choice."""

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration as Stock

import qvl_model
from qvl_kernels import tuning
from qvl_kernels.ops.attention import pytorch as attention_pytorch
from qvl_kernels.ops.attention import selection as attention_selection
from qvl_kernels.testing import relative_error
from qvl_model import cli, digits
from qvl_model import tuning as model_tuning
from qvl_model.modules import fast_path
from qvl_model.processing import load_processor

FEW, MANY, INT8, INT4, CAUSAL, FULL = (
    "linear bf16, few tokens",
    "linear bf16, many tokens",
    "linear bf16 with int8 weights, many tokens",
    "linear bf16 with int4 weights, many tokens",
    "causal attention bf16, many tokens",
    "attention bf16, many tokens",
)


def _stock():
    return Stock.from_pretrained(digits.CHECKPOINT, dtype="auto").eval()


def _inputs():
    processor = load_processor(digits.CHECKPOINT)
    content = [{"type": "image"}, {"type": "text", "text": "Read the digits from left to right."}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(images=[Image.open(digits.SAMPLE).convert("RGB")], text=[prompt], return_tensors="pt")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Works that were measured, in a process that measures small models too and finds PyTorch faster everywhere."""
    works = []

    def measure(asked):
        works.extend(asked)
        return {work.name: tuning.Times(4.0, 2.0) for work in asked}

    monkeypatch.setenv("QVL_TUNE", "1")
    monkeypatch.setenv("QVL_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_answers", {})
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(model_tuning, "LEAST_WEIGHT", 1)
    monkeypatch.setattr(attention_selection, "MIN_TOKENS", 1)
    return works


def test_each_kind_of_work_is_measured_once(measured):
    model = qvl_model.accelerate(_stock())
    names = {work.kind: work.name for work in measured}
    assert list(names) == [FEW, FULL, CAUSAL, MANY] or list(names) == [FEW, CAUSAL, FULL, MANY]
    assert names[MANY] == f"{MANY} (256 x 192 to 512)"
    assert names[CAUSAL] == f"{CAUSAL} (400 tokens, 6 and 3 heads of 32)"
    assert sorted(qvl_model.report(model).kernels) == sorted(
        f"{kind}: pytorch, 2 ms against 4 ms" for kind in (FEW, FULL, CAUSAL, MANY)
    )
    assert f"  {MANY}: pytorch, 2 ms against 4 ms\n" in f"{qvl_model.report(model)}\n"
    measured.clear()
    qvl_model.accelerate(_stock())
    assert not measured
    qvl_model.accelerate(_stock(), weights={"text": "int4", "vision": "int8"})
    names = {work.kind: work.name for work in measured}
    assert names.keys() == {INT8, INT4} and names[INT4].endswith("groups of 32 with zero-points)")


def test_inspect_shows_what_was_measured(measured, capsys):
    assert cli.main(["inspect", "digits"]) == 0
    assert f"{MANY}: qvl, not measured" in capsys.readouterr().out
    assert not measured
    qvl_model.accelerate(_stock())
    assert cli.main(["inspect", "digits"]) == 0
    assert f"{MANY}: pytorch, 2 ms against 4 ms" in capsys.readouterr().out


def test_small_models_are_not_measured(measured, monkeypatch):
    monkeypatch.setattr(model_tuning, "LEAST_WEIGHT", 1 << 20)
    assert qvl_model.report(qvl_model.accelerate(_stock())).kernels == []
    assert not measured


def test_a_bad_switch_changes_nothing(monkeypatch):
    monkeypatch.setenv("QVL_TUNE", "yes")
    model = _stock()
    with pytest.raises(ValueError, match="QVL_TUNE=yes means nothing"):
        qvl_model.accelerate(model)
    assert not qvl_model.is_accelerated(model)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_the_model_by_pytorch_kernels(measured, monkeypatch, weights):
    """Prompt and tokens are those of our kernels, and every kernel that can be PyTorch's is."""
    inputs, results, seen = _inputs(), {}, set()

    def watch(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (seen.add(name), function(*args))[1])

    watch(torch.nn.functional, "linear")
    watch(attention_pytorch, "_attend")
    known = [getattr(owner, name) for owner, name in fast_path._REPLACEABLE]  # or these would count as a user's
    monkeypatch.setattr(fast_path, "_STOCK", known)
    for backend in (tuning.QVL, tuning.PYTORCH):
        if backend == tuning.QVL:
            monkeypatch.setenv("QVL_TUNE", "0")
        else:
            monkeypatch.setenv("QVL_TUNE", "1")
        model = qvl_model.accelerate(_stock(), weights=weights)
        seen.clear()
        with torch.no_grad():
            logits = model(**inputs).logits
        assert seen == ({"linear", "_attend"} if backend == tuning.PYTORCH else set())
        results[backend] = logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
    ours, theirs = results.values()
    assert relative_error(ours[0], theirs[0]) < {None: 2e-2, "int8": 8e-2, "int4": 0.12}[weights]
    assert torch.equal(ours[1], theirs[1])
