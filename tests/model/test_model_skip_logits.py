"""Logits of a training step that can no longer be computed raise one clear error; ``skip_logits=False`` keeps them."""

import copy
import gc
import io
import os
import pickle
import re
import subprocess
import sys
import textwrap
import weakref

import models
import pytest
import qvl_models
import torch
from models import relative
from training_steps import BATCH, LABELS, accuracy, assert_same, loss_of, mask_rare

import qvl_model
from qvl_model.generation import loop, step_gpu
from qvl_model.modules.lazy_logits import LazyLogits


@pytest.fixture
def pair():
    return tuple(model.train() for model in models.pair("small"))


def _backward(model, out):
    out.loss.backward()


def _step(fused):
    def change(model, out):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused).step()

    return change


def _next_forward(model, out):
    with torch.no_grad():
        model(**BATCH)


def _in_place(model, out):
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-3


def _one_element(model, out):
    model.lm_head.weight.data[3, 5] += 1e-3


def _two_swapped(model, out):
    model.lm_head.weight.data[3, [0, 8]] = model.lm_head.weight.data[3, [8, 0]]


def _rows_swapped(model, out):
    model.lm_head.weight.detach().numpy()[[3, 4]] = model.lm_head.weight.detach().numpy()[[4, 3]]


def _other_data(model, out):
    model.lm_head.weight.data = model.lm_head.weight.data * 1.5


def _negated(model, out):
    model.lm_head.weight.data.neg_()


def _freed(model, out):
    model.lm_head.weight.untyped_storage().resize_(0)


def _hidden(model, out):
    out.hidden_states[-1].data[0, 2, 1] += 1.0


def _hidden_in_place(model, out):
    with torch.no_grad():
        out.hidden_states[-1].mul_(1.5)


CHANGES = [
    _backward,
    _step(False),
    _step(True),
    _next_forward,
    _in_place,
    _one_element,
    _two_swapped,
    _rows_swapped,
    _other_data,
    _negated,
    _freed,
    _hidden,
    _hidden_in_place,
]
READS = [
    accuracy,
    repr,
    lambda x: x.tolist(),
    lambda x: x.float().sum(),
    lambda x: x[0, 0, 0].item(),
    pickle.dumps,
    lambda x: x.detach(),
    lambda x: x.numpy(),
    lambda x: x.data,
    lambda x: torch.save(x, io.BytesIO()),
    lambda x: x.float()[0],
    mask_rare,
]


WAYS_OUT = r"model\(\.\.\., skip_logits=False\) or accelerate\(model, skip_logits=False\)"


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_reading_too_late_raises(pair, change):
    _, fast = pair
    for use in (
        accuracy,
        lambda logits: loss_of(fast, logits),
        lambda logits: torch.autograd.grad(loss_of(fast, logits), logits),
    ):
        model = copy.deepcopy(fast)
        out = model(**BATCH, labels=LABELS, output_hidden_states=True)
        change(model, out)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=WAYS_OUT) as error:
                use(out.logits)
            assert len(str(error.value)) < 320
        assert out.logits.shape == (*LABELS.shape, models.VOCABULARY) and out.logits.dtype == torch.float32


@pytest.mark.parametrize("change", [f for f in CHANGES if f not in (_backward, _freed)], ids=lambda f: f.__name__)
def test_a_change_between_loss_and_backward(pair, change):
    """The gradients are stock's, or there is an error: the one of autograd's version counter, as in stock, or ours."""
    found = []
    for model in map(copy.deepcopy, pair):
        out = model(**BATCH, labels=LABELS, output_hidden_states=True)
        change(model, out)
        model.zero_grad()
        try:
            out.loss.backward()
            found.append([p.grad for p in model.parameters()])
        except RuntimeError as error:
            found.append(str(error))
    stock, fast = found
    if isinstance(fast, str):
        assert "inplace operation" in fast or re.search(WAYS_OUT, fast) and len(fast) < 320, fast
        assert change is not _next_forward
    else:
        assert not isinstance(stock, str)
        for ours, theirs in zip(fast, stock, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or relative(ours, theirs) < 1e-4


def test_labels_changed_between_loss_and_backward(pair):
    for model in map(copy.deepcopy, pair):
        shifted = LABELS.roll(-1, 1)
        out = model(**BATCH, labels=LABELS, shift_labels=shifted)
        shifted[0, 1] = 3
        with pytest.raises(RuntimeError, match=f"inplace operation|{WAYS_OUT}"):
            out.loss.backward()


@pytest.mark.parametrize("read", READS)
def test_every_way_of_reading_raises(pair, read):
    out = pair[1](**BATCH, labels=LABELS)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="skip_logits"):
        read(out.logits)


def test_other_changes_do_not_matter(pair):
    """Weights below the head, the forward of another model, of a copy, and calls of the head alone."""

    def step(model):
        out = model(**BATCH, labels=LABELS)
        with torch.no_grad():
            model.model.language_model.layers[0].mlp.up_proj.weight += 0.0
            copy.deepcopy(model)(**BATCH)
            model.lm_head(torch.ones(1, 64))
        return out.logits, type(model.lm_head(torch.ones(2, 64))) is torch.Tensor

    assert_same(pair, step)


def test_nothing_is_kept_alive(pair):
    """Reference counts alone free a step's memory, without the garbage collector."""
    _, fast = pair
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            out = fast(**BATCH, labels=LABELS, output_hidden_states=True)
            logits, hidden = weakref.ref(out.logits), weakref.ref(out.hidden_states[-1].untyped_storage())
            source = weakref.ref(out.logits.source)
            if backward:
                out.loss.backward()
            del out
            assert logits() is None and source() is None and hidden() is None
        out = fast(**BATCH, labels=LABELS)
        source = weakref.ref(out.logits.source)
        out.logits.argmax(-1)
        del out
        assert source() is None
    finally:
        gc.enable()


# skip_logits


def _kinds(model, **options):
    return type(model(**BATCH, labels=LABELS, **options).logits) is LazyLogits


def test_of_one_call(pair):
    stock, fast = pair
    assert _kinds(fast) and not _kinds(fast, skip_logits=False) and _kinds(fast, skip_logits=True) and _kinds(fast)

    def step(model):
        out = model(**BATCH, labels=LABELS, **({"skip_logits": False} if model is fast else {}))
        out.logits.retain_grad()
        out.loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        return out.loss, out.logits, out.logits.grad

    assert_same((copy.deepcopy(stock), fast), step)


def test_of_a_model(pair):
    _, fast = pair
    assert qvl_model.accelerate(fast, skip_logits=False) is fast and not _kinds(fast) and _kinds(fast, skip_logits=True)
    assert not _kinds(copy.deepcopy(fast)) and not _kinds(pickle.loads(pickle.dumps(fast)))
    assert _kinds(qvl_model.accelerate(fast))
    assert (
        not _kinds(qvl_model.restore(qvl_model.accelerate(fast, skip_logits=False)))
        and not fast.model._forward_pre_hooks
    )
    assert _kinds(qvl_model.accelerate(fast))
    assert not any(fast.eval()(**BATCH, skip_logits=choice).logits.__class__ is LazyLogits for choice in (True, False))
    with pytest.raises(TypeError, match="skip_logits must be a bool"):
        qvl_model.accelerate(fast, skip_logits=None)


def test_reaches_nothing_else(pair, monkeypatch):
    """The keyword reaches neither layers nor attention functions, which may treat unknown keywords differently."""
    _, fast = pair
    seen = []
    for module in (fast.model.language_model, fast.model.visual, fast.model.language_model.layers[0]):
        module.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    fast(**BATCH, skip_logits=False)
    assert len(seen) == 3 and not any("skip_logits" in kwargs for kwargs in seen)


def test_under_peft(pair):
    from peft import LoraConfig, get_peft_model

    _, fast = pair
    for targets, saved in ((["q_proj"], None), (["q_proj", "lm_head"], None), (["q_proj"], ["lm_head"])):
        wrapped = get_peft_model(copy.deepcopy(fast), LoraConfig(r=2, target_modules=targets, modules_to_save=saved))
        assert _kinds(wrapped) == ("lm_head" not in targets) and not _kinds(wrapped, skip_logits=False)
        assert not _kinds(qvl_model.accelerate(wrapped, skip_logits=False))


def test_decoding_by_captured_steps_is_not_in_the_way(pair, monkeypatch):
    """Captured steps refuse hooks, except this one of ours."""
    reasons, original, fast = [], loop.why_not, pair[1].eval()
    monkeypatch.setattr(step_gpu, "why_no_graphs", lambda device: None)
    monkeypatch.setattr(loop, "why_not", lambda *args: reasons.append(original(*args)) or "stock, after all")
    for _ in range(2):
        fast.generate(**BATCH, max_new_tokens=2, do_sample=False, pad_token_id=0)
        fast.model.register_forward_pre_hook(lambda *_: None)
    assert reasons == [None, "Qwen3VLModel has hooks or another forward"]


def test_quantised_head(pair):
    model = qvl_model.accelerate(pair[1], weights={"lm_head": "int8"})
    assert not _kinds(model) and not _kinds(model, skip_logits=False)


def test_trainer_still_knows_the_columns(pair, tmp_path):
    from transformers import Trainer, TrainingArguments

    columns = []
    for model in pair:
        trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
        trainer._set_signature_columns_if_needed()
        columns.append(trainer._signature_columns)
    assert columns[0] == columns[1] and "pixel_values" in columns[0]


def test_compiled_forward():
    """Compiled, the head computes its logits; the keyword is removed too."""
    pair = tuple(model.train() for model in models.pair("one_layer"))
    ids = models.inputs([7])["input_ids"]
    losses = []
    for model in pair:
        torch._dynamo.reset()
        options = {"skip_logits": False} if model is pair[1] else {}
        out = torch.compile(model, backend="eager")(input_ids=ids, labels=ids, use_cache=False, **options)
        assert type(out.logits) is torch.Tensor
        out.loss.backward()
        losses += [out.loss.detach(), model.lm_head.weight.grad]
    assert relative(losses[2], losses[0]) < 5e-5 and relative(losses[3], losses[1]) < 5e-5


@pytest.mark.parametrize("connector", ["mlp", "attention"])
def test_qvl(connector):
    pair = tuple(
        model.train() for model in qvl_models.pair(connector, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    batch = qvl_models.inputs(5, 9)
    ids, results = batch["input_ids"], []
    for model in pair:
        out = model(**batch, labels=ids, num_items_in_batch=5)
        with torch.no_grad():
            seen = out.logits.argmax(-1)
        out.logits[..., 50:] = -3.0
        out.logits.retain_grad()
        loss = model.loss_function(logits=out.logits, labels=ids, vocab_size=qvl_models.VOCABULARY)
        (loss + out.loss).backward()
        results.append((seen, out.loss.detach(), loss.detach(), out.logits.grad, model.lm_head.weight.grad))
    for expected, ours in zip(*results):
        assert relative(ours, expected) < 5e-5
    _, fast = pair
    late, kept = fast(**batch, labels=ids), fast(**batch, labels=ids, skip_logits=False)
    assert type(kept.logits) is torch.Tensor
    with pytest.raises(RuntimeError, match="skip_logits"):
        late.logits.sum()
    assert type(qvl_model.accelerate(fast, skip_logits=False)(**batch).logits) is torch.Tensor


PEAK = """
    import re, sys
    from pathlib import Path
    import torch, transformers, models, qvl_model

    def resident(field):
        return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

    config = models.config("small")
    config.text_config.vocab_size = 40_000
    options = {"default": {}, "kept": {"skip_logits": False}}[sys.argv[1]]
    model = qvl_model.accelerate(transformers.Qwen3VLForConditionalGeneration(config).train())
    batch = torch.randint(0, 100, (2, 512))
    for _ in range(2):  # in the second step all code is loaded, and the gradients exist
        base = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        model(input_ids=batch, labels=batch, **options).loss.backward()
    print(resident("VmHWM") - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_logits_that_nobody_reads_take_no_memory():
    """40,000 logits of 1,024 tokens in fp32 are 164 MB, and as much for their gradient."""

    def peak(logits):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", textwrap.dedent(PEAK), logits]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    default, kept = peak("default"), peak("kept")
    assert kept > default + 250_000  # KiB
