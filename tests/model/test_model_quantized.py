"""int8 and int4 weights in a model: storage, results, and restore."""

import copy
import io
import pickle
import threading

import gpu_steps
import models
import pytest
import qvl_models
import torch
from kernel_selection import TILE_ISAS
from models import assert_close, inputs, pair, relative
from torch import nn

import qvl_kernels
import qvl_model
from bench.fp64_reference import fake_quantised
from qvl_kernels.quantization import dequantize, quantize, rounded_activations
from qvl_model.generation.step_gpu import GpuStep
from qvl_model.quantization.convert import formats_of
from qvl_model.quantization.modules import PackedEmbedding, PackedLinear

FEW, MANY = ([5], [3]), ([9, (1, 4, 6), 3], [14])  # up to 16 rows of text, and more with images
FORMATS = ["int8", "int4", {"text": "int4", "vision": "int8", "lm_head": None}, {"lm_head": "int8"}]


def _cosine(out, expected):
    return torch.nn.functional.cosine_similarity(out.double().flatten(), expected.double().flatten(), dim=0).item()


def _least_cosine(weights):
    """Matrix units round int4 again and activations in wider groups: tests/helpers/quantized_numbers.py has how."""
    return 0.999 if "int4" in str(weights) and qvl_kernels.cpu_info()["isa"] in TILE_ISAS else 0.9999


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_computes_with_rounded_weights_and_activations(weights):
    stock, fast = pair()
    qvl_model.accelerate(fast, weights=weights)
    exact = fake_quantised(stock, fast)
    with torch.no_grad():
        for batch in (inputs(*FEW), inputs(*MANY)):
            out, expected = fast(**batch).logits, exact(**batch).logits
            assert _cosine(out, expected) > _least_cosine(weights)
            assert relative(expected, stock(**batch).logits) > 3 * relative(out, expected)
    generated = [model.generate(**inputs(*FEW), max_new_tokens=6, do_sample=False) for model in (fast, exact)]
    assert torch.equal(*generated)


def test_every_linear_layer_is_quantised_once():
    _, fast = pair()
    linears = sum(isinstance(module, nn.Linear) for module in fast.modules())
    qvl_model.accelerate(fast, weights="int8")
    assert sum(isinstance(module, PackedLinear) for module in fast.modules()) == linears
    embedding, head = fast.get_input_embeddings(), fast.lm_head
    assert type(embedding) is PackedEmbedding and embedding.weight_values is head.weight_values
    values = head.weight_values
    qvl_model.accelerate(fast, weights="int8")  # quantised weights do not change
    assert head.quantized.bits == 8 and head.weight_values is values
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
    assert (
        state[f"{name}.weight_values"].dtype == torch.uint8 and state[f"{name}.weight_scales"].dtype == torch.bfloat16
    )
    assert f"{name}.weight" not in state
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
    with pytest.raises(ValueError, match="was not quantised from the checkpoint"):
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
    [
        ("int3", ValueError, "is no format"),
        ({"head": "int8"}, ValueError, "names the part 'head'"),
        (8, TypeError, "mapping"),
    ],
)
def test_unknown_formats(weights, error, message):
    with pytest.raises(error, match=message):
        formats_of(weights)


def _dequantised(quantised: nn.Module, stock: nn.Module) -> nn.Module:
    """``stock`` with the dequantised weights of the quantised model."""
    modules = dict(stock.named_modules())
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, PackedLinear | PackedEmbedding):
                modules[name].weight.copy_(module.dequantize())
    return stock


def _assert_quantised(quantised: nn.Module, stock: nn.Module) -> None:
    """Every weight equals the stock model's, or its quantised form."""
    for name, module in stock.named_modules():
        for own, expected in module.named_parameters(recurse=False):
            ours = quantised.get_submodule(name)
            if own == "weight" and isinstance(ours, PackedLinear | PackedEmbedding):
                again = quantize(expected.detach(), **ours.quantized.options)
                assert relative(ours.dequantize(), dequantize(again)) < 1e-6, name
            else:
                assert torch.equal(getattr(ours, own), expected), (name, own)


V2 = {"zero_points": True, "scale_dtype": torch.float16}


@pytest.mark.parametrize(("bits", "options"), [("int8", {}), ("int4", {}), ("int4", V2)])
def test_a_weight_is_read_and_written_as_any_other(bits, options):
    torch.manual_seed(0)
    layer = PackedLinear.from_linear(nn.Linear(70, 33), bits, group=32, **options)
    first, weight = layer.dequantize(), layer.weight
    assert (
        isinstance(weight, nn.Parameter)
        and weight.shape == (33, 70)
        and weight.dtype == torch.float32
        and not weight.requires_grad
    )
    assert torch.equal(weight.clone(), first) and torch.equal(
        weight[3:5].t() @ weight[3:5], first[3:5].t() @ first[3:5]
    )
    assert torch.equal(torch.cat([*weight.split(10)]), first) and torch.equal(weight.to(torch.float64), first.double())
    changes = {
        "weight.data =": lambda w: setattr(w, "data", 2 * w.data.clone()),
        "weight.data +=": lambda w: setattr(w, "data", w.data.__iadd__(torch.arange(33.0)[:, None])),
        "rows": lambda w: w.data.__setitem__([2, 5], torch.arange(140.0).view(2, 70)),
        "a slice": lambda w: w.data[3:9].zero_(),
        "a column": lambda w: w.data.t()[4].fill_(7.0),
        "index_copy_": lambda w: w.data.index_copy_(0, torch.tensor([1]), torch.ones(1, 70)),
        "init": lambda w: nn.init.constant_(w, 0.25),
    }
    with torch.no_grad():
        for name, change in changes.items():
            before, plain = layer.quantized, nn.Parameter(layer.dequantize())
            before = before.apply(torch.clone)
            change(layer.weight)
            change(plain)
            expected = dequantize(quantize(plain.detach(), layer.quantized.bits, 32, **options))
            same = (plain == dequantize(before)).all(1)
            after = zip(layer.quantized.tensors, before.tensors)
            assert all(torch.equal(now[same], then[same]) for now, then in after), name
            assert torch.equal(layer.dequantize()[~same], expected[~same]) and not same.all(), name
    for wrong, error, message in (
        (torch.ones(33, 71), ValueError, r"takes shape \[N, 70\], got \[33, 71\]"),
        (torch.full((33, 70), torch.nan), ValueError, "NaN or infinite"),
    ):
        with pytest.raises(error, match=message):
            layer.weight.data = wrong
    with pytest.raises(RuntimeError, match="a quantised weight is a constant; train an adapter"):
        layer.weight.requires_grad_()
    with pytest.raises(TypeError, match="takes an nn.Parameter"):
        layer.weight = torch.ones(33, 70)
    constant = quantize(torch.full((33, 70), 0.25), layer.quantized.bits, 32, **options)
    assert torch.equal(layer.dequantize(), dequantize(constant))
    layer.weight = weight = nn.Parameter(torch.ones(33, 70))
    assert type(layer) is nn.Linear and layer.weight is weight and list(layer.state_dict()) == ["weight", "bias"]


def test_tied_weights_are_one_through_copies_moves_and_writes():
    fast = qvl_model.accelerate(models.stock_model("small"), weights="int8")
    for model in (
        fast,
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        copy.deepcopy(fast).to(torch.bfloat16),
        copy.deepcopy(fast).to("meta"),
    ):
        embedding, head = model.get_input_embeddings(), model.lm_head
        assert embedding.weight_values is head.weight_values and embedding.weight_scales is head.weight_scales
        if model.device.type == "cpu":
            head.weight.data[3] = 1.0
            assert torch.equal(embedding(torch.tensor([3, 3])).float(), torch.ones(2, 64)) and torch.equal(
                embedding.dequantize(), head.dequantize()
            )
    lone = copy.deepcopy(fast.lm_head)
    assert type(lone) is PackedLinear and torch.equal(lone.weight_values, fast.lm_head.weight_values)


@pytest.mark.parametrize("adapted", [False, True], ids=["", "under LoRA"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(("name", "size"), [("small", 173), ("small", 140), ("untied_bias", 171)])
def test_resize_token_embeddings(tmp_path, name, size, weights, adapted):
    from peft import LoraConfig, get_peft_model

    fast = qvl_model.accelerate(models.stock_model(name), weights=weights)
    stock, batch = _dequantised(fast, models.stock_model(name)), inputs([6])
    batch["input_ids"] %= 140
    for model in (fast, stock):
        tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapted else model
        tuned.resize_token_embeddings()
        torch.manual_seed(3)
        tuned.resize_token_embeddings(size)
        if adapted:
            assert tuned.unload() is model
    for model in (fast, stock):
        assert (
            model.config.text_config.vocab_size
            == size
            == model.get_input_embeddings().num_embeddings
            == model.lm_head.out_features
        )
    if name == "small":
        assert fast.get_input_embeddings().weight_values is fast.lm_head.weight_values
    _assert_quantised(fast, stock)
    assert fast.num_parameters() == stock.num_parameters() and fast.num_parameters(
        exclude_embeddings=True
    ) == stock.num_parameters(exclude_embeddings=True)
    fast.save_pretrained(tmp_path)
    again = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad(), qvl_kernels.use_backend("reference"):
        logits = fast(**batch).logits
        assert logits.shape[-1] == size and torch.equal(again(**batch).logits, logits)
        assert relative(logits, stock(**batch).logits) < 0.05
    assert torch.equal(*(model.generate(**batch, max_new_tokens=4, do_sample=False) for model in (fast, again)))


@pytest.mark.parametrize("name", ["small", "untied_bias"])
def test_tying_and_initialising_again(name):
    fast = qvl_model.accelerate(models.stock_model(name), weights="int8")
    stock = _dequantised(fast, models.stock_model(name))
    before = {key: tensor.clone() for key, tensor in fast.state_dict().items()}
    for model in (fast, stock):
        model.tie_weights()
        model.post_init()
        model.init_weights()  # all is initialised already
    assert all(torch.equal(tensor, before[key]) for key, tensor in fast.state_dict().items())
    _assert_quantised(fast, stock)
    for model in (fast, stock):
        for module in model.modules():
            module._is_hf_initialized = False
        torch.manual_seed(2)
        model.init_weights()
    assert not torch.equal(fast.lm_head.weight_values, before["lm_head.weight_values"])
    _assert_quantised(fast, stock)


def test_a_float_embedding_is_tied_to_a_quantised_head():
    fast = qvl_model.accelerate(models.stock_model("small"), weights="int8")
    torch.manual_seed(0)
    embedding = nn.Embedding(models.VOCABULARY, 64)
    fast.set_input_embeddings(embedding)
    fast.tie_weights()
    assert fast.lm_head.weight is embedding.weight and type(fast.lm_head) is nn.Linear
    stock, batch = _dequantised(fast, models.stock_model("small")), inputs([6])
    stock.set_input_embeddings(embedding)
    stock.tie_weights()
    with torch.no_grad(), qvl_kernels.use_backend("reference"):
        assert relative(fast(**batch).logits, stock(**batch).logits) < 0.05


def test_a_float_head_is_tied_to_a_quantised_embedding(tmp_path):
    fast = qvl_model.accelerate(models.stock_model("small"), weights="int8")
    stock, batch = _dequantised(fast, models.stock_model("small")), inputs([6])
    fast.set_output_embeddings(nn.Linear(64, models.VOCABULARY, bias=False))
    fast.tie_weights()
    fast.save_pretrained(tmp_path)
    again = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad(), qvl_kernels.use_backend("reference"):
        assert torch.equal(fast.lm_head.weight.clone(), stock.lm_head.weight)
        assert relative(fast(**batch).logits, stock(**batch).logits) < 0.05
        assert torch.equal(again(**batch).logits, fast(**batch).logits)


@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["odd", "untied_bias", "mlp", "attention"])
def test_parameters_are_counted_as_those_of_the_unquantised_model(name, weights):
    stock = models.stock_model(name) if name in models.CONFIGS else qvl_models.plain_model(name)
    fast = qvl_model.accelerate(copy.deepcopy(stock), weights=weights)
    assert fast.num_parameters() == stock.num_parameters()
    assert fast.num_parameters(exclude_embeddings=True) == stock.num_parameters(exclude_embeddings=True)
    for model in (fast, stock):  # quantised weights do not train
        model.requires_grad_(False)
        model.model.language_model.norm.requires_grad_(True)
    for counted in ({"only_trainable": True}, {"only_trainable": True, "exclude_embeddings": True}):
        assert fast.num_parameters(**counted) == stock.num_parameters(**counted) > 0


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
    tuned = get_peft_model(
        fast, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).train()
    loss = tuned(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    assert (
        gradients and all("lora" in name for name in gradients) and all(g.abs().max() > 0 for g in gradients.values())
    )
    assert relative(tuned.eval()(**batch).logits.detach(), before) > 1e-3


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_steps_of_gpus(weights, monkeypatch):
    _, fast = pair()
    qvl_model.accelerate(fast, weights=weights)
    batch = inputs([5], [2])
    expected = fast.generate(**batch, max_new_tokens=8, do_sample=False)
    gpu_steps.offer(monkeypatch)
    calls, original = [], GpuStep.run
    monkeypatch.setattr(GpuStep, "run", lambda *args: calls.append(1) or original(*args))
    assert torch.equal(fast.generate(**batch, max_new_tokens=8, do_sample=False), expected) and len(calls) == 7


@pytest.mark.parametrize("options", [{"zero_points": True}, V2], ids=["zeros", "fp16"])
def test_zero_points_through_copies_moves_and_state_dicts(options):
    torch.manual_seed(0)
    layer = PackedLinear.from_linear(nn.Linear(70, 33), "int4", group=32, **options)
    stored = layer.quantized.apply(torch.clone)
    assert list(layer.state_dict()) == ["bias", "weight_values", "weight_scales", "weight_zeros"]
    assert "in groups of 32 with zero-points" in repr(layer)
    for moved in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to(torch.bfloat16)):
        assert moved.weight_scales.dtype == stored.scales.dtype and moved.weight_zeros.dtype == torch.uint8
        assert all(torch.equal(a, b) for a, b in zip(moved.quantized.tensors, stored.tensors))
    other = PackedLinear.from_linear(nn.Linear(70, 33), "int4", group=32, **options)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), layer.dequantize())
    with pytest.raises(RuntimeError, match="weight_zeros"):
        PackedLinear.from_linear(nn.Linear(70, 33), "int4", group=32).load_state_dict(layer.state_dict())
    tied = PackedLinear.from_linear(nn.Linear(70, 33), "int4", group=32)
    tied.weight = layer.weight
    assert tied.weight_zeros is layer.weight_zeros
    tied.weight = nn.Parameter(torch.ones(33, 70))
    assert type(tied) is nn.Linear and list(tied.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(("weights", "options"), [("int8", {}), ("int4", {}), ("int4", V2)])
def test_quantised_linear_of_any_model(weights, options):
    torch.manual_seed(0)
    linear = nn.Linear(70, 33)
    layer = PackedLinear.from_linear(linear, weights, group=32, **options)
    x = torch.randn(4, 70)
    expected = nn.functional.linear(rounded_activations(x, layer.quantized), layer.dequantize(), linear.bias)
    assert_close(layer(x), expected)
    assert layer.bias is linear.bias and isinstance(linear.weight, nn.Parameter) and "int" in repr(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="takes an nn.Linear"):
        PackedLinear.from_linear(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="one of int8, int4"):
        PackedLinear.from_linear(linear, "fp8")
    assert dequantize(layer.quantized).shape == (33, 70)


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
    # transformers keeps rope_deltas on the model: only prompts of the same deltas are safe in two threads of stock,
    # too.
    batches = [inputs([7, (1, 4, 6), 2], seed=1), inputs([3, (1, 4, 6), 9], seed=2)]
    expected = [fast.generate(**batch, max_new_tokens=12, do_sample=False) for batch in batches]
    results = [[], []]
    _at_once(*(_generates(fast, batch, 4, outs) for batch, outs in zip(batches, results)))
    for outs, alone in zip(results, expected):
        assert len(outs) == 4 and all(torch.equal(out, alone) for out in outs)


def test_two_models_in_one_process():
    """Each gives the same results with and without the other one, interleaved and in parallel."""
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


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"weights": "int8"}, {"weights": "int4"}),
        ({"weights": "int4"}, {"weights": {"text": "int8"}}),
        ({"weights": "int4", "group": 32}, {"weights": "int4", "group": 64}),
        ({"weights": {"text": "int8"}}, {"weights": "int4"}),
    ],
)
def test_packing_again_in_another_format_is_refused(first, then):
    model = qvl_model.accelerate(models.stock_model("small"), **first)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"quantised as int\d.* already, which int\d.* cannot be made of; restore the model first",
    ):
        qvl_model.accelerate(model, **then)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], x) for name, x in before.items())


def test_packing_again_in_the_same_format_or_what_is_left_is_fine():
    model = qvl_model.accelerate(models.stock_model("small"), weights={"text": "int4"}, group=32)
    up = model.model.language_model.layers[0].mlp.up_proj.weight_values
    qvl_model.accelerate(model, weights={"text": "int4", "vision": "int8"}, group=32)
    assert model.model.language_model.layers[0].mlp.up_proj.weight_values is up
    assert isinstance(model.model.visual.blocks[0].attn.qkv, PackedLinear)
    qvl_model.accelerate(model)
    assert model.model.language_model.layers[0].mlp.up_proj.weight_values is up
    qvl_model.accelerate(model, weights="int4")  # groups that are not named may be any
    assert model.model.language_model.layers[0].mlp.up_proj.weight_values is up


class _Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


TAKERS = {
    "weight_norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "spectral_norm": lambda layer: nn.utils.parametrizations.spectral_norm(layer),
    "one of one's own": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", _Twice()),
    "deleted": lambda layer: delattr(layer, "weight"),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_a_quantised_weight_cannot_be_parametrized(taker):
    model = qvl_model.accelerate(models.stock_model("small"), weights="int8")
    batch = inputs(*FEW)
    with torch.no_grad():
        before = model(**batch).logits
        with pytest.raises(
            TypeError, match="cannot be taken out of it, as parametrizations and adapters with target_parameters do"
        ):
            TAKERS[taker](model.model.language_model.layers[0].mlp.up_proj)
        assert torch.equal(model(**batch).logits, before)


def test_layers_are_made_from_linear_layers():
    with pytest.raises(TypeError, match="make it with PackedLinear.from_linear"):
        PackedLinear(64, 10)
