"""int8 and int4 weights in a model: what is stored, what it computes, and how to come back."""

import copy
import io
import pickle
import threading

import models
import pytest
import torch
from models import assert_close, inputs, pair, relative
from torch import nn

import qvl_model
from bench.truth import fake_quantised
from qvl_kernels import quant
from qvl_model import decoding
from qvl_model.modules.packed import PackedEmbedding, PackedLinear
from qvl_model.quantization import formats_of

FEW, MANY = ([5], [3]), ([9, (1, 4, 6), 3], [14])  # up to 16 rows of text, and more with images
FORMATS = ["int8", "int4", {"text": "int4", "vision": "int8", "lm_head": None}, {"lm_head": "int8"}]


def _cosine(out, expected):
    return torch.nn.functional.cosine_similarity(out.double().flatten(), expected.double().flatten(), dim=0).item()


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_computes_with_rounded_weights_and_activations(weights):
    stock, fast = pair()
    qvl_model.accelerate(fast, weights=weights)
    exact = fake_quantised(stock, fast)
    with torch.no_grad():
        for batch in (inputs(*FEW), inputs(*MANY)):
            out, expected = fast(**batch).logits, exact(**batch).logits
            assert _cosine(out, expected) > 0.9999
            assert relative(expected, stock(**batch).logits) > 3 * relative(out, expected)
    generated = [model.generate(**inputs(*FEW), max_new_tokens=6, do_sample=False) for model in (fast, exact)]
    assert torch.equal(*generated)


def test_every_linear_layer_is_packed_once():
    _, fast = pair()
    linears = sum(isinstance(module, nn.Linear) for module in fast.modules())
    qvl_model.accelerate(fast, weights="int8")
    assert sum(isinstance(module, PackedLinear) for module in fast.modules()) == linears
    embedding, head = fast.get_input_embeddings(), fast.lm_head
    assert type(embedding) is PackedEmbedding and embedding.weight_values is head.weight_values
    qvl_model.accelerate(fast, weights="int4")  # what is packed stays as it is
    assert head.quantized.bits == 8
    report = str(qvl_model.report(fast))
    assert "PackedLinear (int8)" in report and "PackedEmbedding (int8)" in report


def test_untied_embedding_stays():
    fast = qvl_model.accelerate(models.stock_model("untied_bias"), weights="int8")
    assert type(fast.get_input_embeddings()) is nn.Embedding and isinstance(fast.lm_head, PackedLinear)
    with torch.no_grad():
        assert fast(**inputs([5])).logits.isfinite().all()


@pytest.mark.parametrize("part", ["visual", "language_model"])
def test_a_part_alone(part):
    _, fast = pair()
    alone = qvl_model.accelerate(getattr(fast.model, part), weights={"vision" if part == "visual" else "text": "int8"})
    assert any(isinstance(module, PackedLinear) for module in alone.modules())
    assert not isinstance(fast.lm_head, PackedLinear)


def test_state_dict_copies_and_dtypes():
    _, fast = pair()
    qvl_model.accelerate(fast, weights="int4")
    state = fast.state_dict()
    name = "model.language_model.layers.0.mlp.up_proj"
    assert state[f"{name}.weight_values"].dtype == torch.uint8 and state[f"{name}.weight_scales"].dtype == torch.bfloat16
    assert f"{name}.weight" not in state and not any(key.endswith("rows_like") for key in state)
    batch = inputs(*FEW)
    with torch.no_grad():
        expected = fast(**batch).logits
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        other = qvl_model.accelerate(models.stock_model("odd", seed=1), weights="int4")
        other.load_state_dict(torch.load(buffer))
        for model in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), other):
            assert torch.equal(model(**batch).logits, expected)
        half = copy.deepcopy(fast).to(torch.bfloat16)
        assert half.lm_head.weight_scales.dtype == torch.bfloat16 and half(**batch).logits.dtype == torch.bfloat16
        int8 = qvl_model.accelerate(models.stock_model(), weights="int8").half()
        assert int8.lm_head.weight_scales.dtype == torch.float32 and int8(**batch).logits.dtype == torch.float16


def test_restore_reads_the_checkpoint_again(tmp_path):
    from transformers import Qwen3VLForConditionalGeneration

    models.stock_model().save_pretrained(tmp_path)
    stock, fast = (Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32) for _ in range(2))
    qvl_model.restore(qvl_model.accelerate(fast, weights={"text": "int4", "vision": "int8", "lm_head": "int4"}))
    assert type(fast) is type(stock) and [type(m) for m in fast.modules()] == [type(m) for m in stock.modules()]
    state, expected = fast.state_dict(), stock.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert fast.lm_head.weight is fast.get_input_embeddings().weight


def test_restore_refuses_what_it_cannot_bring_back(tmp_path):
    from transformers import Qwen3VLForConditionalGeneration

    _, fast = pair()
    qvl_model.accelerate(fast, weights="int8")
    with pytest.raises(ValueError, match="not known"):
        qvl_model.restore(fast)
    models.stock_model().save_pretrained(tmp_path)
    fast = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        fast.model.language_model.layers[1].mlp.up_proj.weight.mul_(2)
    qvl_model.accelerate(fast, weights="int8")
    with pytest.raises(ValueError, match="was not packed from the checkpoint"):
        qvl_model.restore(fast)
    assert isinstance(fast.lm_head, PackedLinear) and fast(**inputs([4])).logits.isfinite().all()


def test_weights_that_are_not_finite_leave_the_model_as_it_was():
    stock, _ = pair()
    with torch.no_grad():
        stock.model.visual.blocks[3].mlp.linear_fc2.weight[1, 2] = float("inf")
    types = [type(module) for module in stock.modules()]
    with pytest.raises(ValueError, match=r"blocks\.3\.mlp\.linear_fc2\.weight has NaN or infinite"):
        qvl_model.accelerate(stock, weights="int4")
    assert [type(module) for module in stock.modules()] == types


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [("int3", ValueError, "is no format"), ({"head": "int8"}, ValueError, "names the part 'head'"), (8, TypeError, "mapping")],
)
def test_unknown_formats(weights, error, message):
    with pytest.raises(error, match=message):
        formats_of(weights)


def test_hooks_and_adapters_stay_and_train():
    from peft import LoraConfig, get_peft_model

    _, fast = pair("small")
    seen = []
    fast.model.language_model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    qvl_model.accelerate(fast, weights="int8")
    batch = inputs([6])
    with torch.no_grad():
        before = fast(**batch).logits
    assert seen
    tuned = get_peft_model(fast, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).train()
    loss = tuned(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    assert gradients and all("lora" in name for name in gradients) and all(g.abs().max() > 0 for g in gradients.values())
    assert relative(tuned.eval()(**batch).logits.detach(), before) > 1e-3


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_decoding_loop_of_gpus(weights, monkeypatch):
    _, fast = pair()
    qvl_model.accelerate(fast, weights=weights)
    batch = inputs([5], [2])
    expected = fast.generate(**batch, max_new_tokens=8, do_sample=False)
    monkeypatch.setattr(decoding, "graphs_possible", lambda device: None)
    calls, original = [], decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    assert torch.equal(fast.generate(**batch, max_new_tokens=8, do_sample=False), expected) and calls


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_linear_of_any_model(weights):
    torch.manual_seed(0)
    linear = nn.Linear(70, 33)
    packed = PackedLinear.from_linear(linear, weights, group=32)
    x = torch.randn(4, 70)
    expected = nn.functional.linear(quant.rounded_activations(x, packed.quantized), packed.dequantize(), linear.bias)
    assert_close(packed(x), expected)
    assert packed.bias is linear.bias and isinstance(linear.weight, nn.Parameter) and "int" in repr(packed)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="takes an nn.Linear"):
        PackedLinear.from_linear(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="one of int8, int4"):
        PackedLinear.from_linear(linear, "fp8")
    assert quant.dequantize(packed.quantized).shape == (33, 70)


def _at_once(*works) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _generates(model, batch, times: int, results: list):
    return lambda: results.extend(model.generate(**batch, max_new_tokens=12, do_sample=False) for _ in range(times))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_two_threads_on_one_model(weights):
    fast = qvl_model.accelerate(models.stock_model(), weights=weights)
    # transformers keeps rope_deltas on the model: only prompts of the same deltas are safe in two threads of stock, too.
    batches = [inputs([7, (1, 4, 6), 2], seed=1), inputs([3, (1, 4, 6), 9], seed=2)]
    expected = [fast.generate(**batch, max_new_tokens=12, do_sample=False) for batch in batches]
    results = [[], []]
    _at_once(*(_generates(fast, batch, 4, outs) for batch, outs in zip(batches, results)))
    for outs, alone in zip(results, expected):
        assert len(outs) == 4 and all(torch.equal(out, alone) for out in outs)


def test_two_models_in_one_process():
    """Each gives what it gave before the other one was there, in turn and at once."""
    settings = [("odd", torch.float32, "int8"), ("multi_query", torch.bfloat16, "int4")]
    batch, loaded, expected = inputs([7, (1, 4, 6), 2], [4]), [], []
    for name, dtype, weights in settings:
        loaded.append(qvl_model.accelerate(models.stock_model(name, dtype), weights=weights))
        expected.append(loaded[-1].generate(**batch, max_new_tokens=12, do_sample=False))
    results = [[], []]
    for _ in range(2):
        for model, outs in zip(loaded, results):
            _generates(model, batch, 1, outs)()
    _at_once(*(_generates(model, batch, 3, outs) for model, outs in zip(loaded, results)))
    for outs, alone in zip(results, expected):
        assert len(outs) == 5 and all(torch.equal(out, alone) for out in outs)
