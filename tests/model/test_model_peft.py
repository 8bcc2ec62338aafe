"""PEFT adapters on accelerated models, quantised or not, equal stock with the same weights and adapters."""

import copy
import pickle

import models
import peft
import pytest
import torch
from models import assert_close, relative
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from torch import nn

import qvl_kernels
import qvl_model
from qvl_kernels.quantization import dequantize, quantize
from qvl_model.quantization.modules import PackedEmbedding, PackedLinear

LAYERS = ["q_proj", "down_proj", "qkv"]
LORA = dict(r=4, target_modules=LAYERS, init_lora_weights=False)
METHODS = {
    "lora": lambda: LoraConfig(**LORA),
    "dora": lambda: LoraConfig(**LORA, use_dora=True),
    "loha": lambda: LoHaConfig(r=4, target_modules=LAYERS, init_weights=False),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "tied": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
    "tokens": lambda: TrainableTokensConfig(
        token_indices=[3, 7, 11], target_modules=["embed_tokens"], init_weights=False
    ),
    "lora and tokens": lambda: LoraConfig(**LORA, trainable_token_indices=[3, 7]),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "copies": lambda: LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"]),
    "tied copies": lambda: LoraConfig(**LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "a copied MLP": lambda: LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["layers.1.mlp"]),
}
MERGED = ["lora", "dora", "loha", "ia3", "tied", "tokens"]
WEIGHTS = [None, "int8", "int4"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def _batch(image: bool = True) -> dict:
    batch = models.inputs([5, (1, 4, 6), 3, 7, 11], [14]) if image else models.inputs([9], [7])
    batch["input_ids"][-1, -4:-1] = torch.tensor([3, 7, 11])
    return batch


def _fast(weights=None, name: str = "small", dtype: torch.dtype = torch.float32) -> nn.Module:
    return qvl_model.accelerate(models.stock_model(name, dtype), weights=weights)


def _stock(fast: nn.Module) -> nn.Module:
    """Stock with the (dequantised) weights of the accelerated model."""
    stock = models.stock_model("small" if fast.config.tie_word_embeddings else "untied_bias")
    modules = dict(stock.named_modules())
    with torch.no_grad():
        for name, module in _quantised(fast).items():
            modules[name].weight.copy_(module.dequantize())
    return stock


def _quantised(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, PackedLinear | PackedEmbedding)
    }


def _bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the quantised weights, which must not change by a bit."""
    return {
        f"{name}.{own}": tensor.clone()
        for name, module in _quantised(model).items()
        for own, tensor in module.named_buffers(recurse=False)
    }


def _same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _adapted(model: nn.Module, config) -> nn.Module:
    torch.manual_seed(5)
    tuned = get_peft_model(model, config)
    with torch.no_grad():  # magnitudes of DoRA start as norms; trained copies and tokens start as their originals
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return tuned.eval()


def _gradients(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same_gradients(fast: nn.Module, stock: nn.Module, batch: dict) -> None:
    (expected_loss, expected), (loss, gradients) = (_gradients(model, batch) for model in (stock, fast))
    assert_close(loss, expected_loss)
    assert gradients.keys() == expected.keys() and gradients
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_adapters_train_as_on_stock(weights, method):
    """On the backend "reference", which does not quantise activations."""
    fast = _fast(weights)
    stock, batch = _stock(fast), _batch(image=method != "prompt")
    tuned, expected = (_adapted(model, METHODS[method]()) for model in (fast, stock))
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {
        n for n, p in expected.named_parameters() if p.requires_grad
    }
    for counted in (
        {},
        {"only_trainable": True},
        {"exclude_embeddings": True},
        {"only_trainable": True, "exclude_embeddings": True},
    ):
        assert tuned.get_base_model().num_parameters(**counted) == expected.get_base_model().num_parameters(**counted)
    with qvl_kernels.use_backend("reference" if weights else "cpp"):
        _assert_same_gradients(tuned.train(), expected.train(), batch)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("method", ["lora", "copies", "prompt"])
def test_a_quantised_model_learns(weights, method):
    tuned = _adapted(_fast(weights), METHODS[method]()).train()
    batch, bits = _batch(image=False), _bits(tuned)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = tuned(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5 and _same(_bits(tuned), bits)


@pytest.mark.parametrize(
    ("weights", "method"),
    [*(("int8", name) for name in METHODS if name not in ("prompt", "loha", "ia3")), ({"text": "int4"}, "lora")],
    ids=str,
)
def test_quantising_under_adapters_is_quantising_before_them(weights, method):
    late = qvl_model.accelerate(_adapted(models.stock_model("small"), METHODS[method]()), weights=weights)
    early = _adapted(_fast(weights), METHODS[method]())
    assert {n for n, p in late.named_parameters() if p.requires_grad} == {
        n for n, p in early.named_parameters() if p.requires_grad
    }
    assert _same(_bits(late), _bits(early)) and _quantised(late)
    late.load_state_dict(early.state_dict())  # values made from the dense weights: tokens, copies, norms
    batch = _batch()
    with qvl_kernels.use_backend("reference"):
        with torch.no_grad():
            assert_close(late(**batch).logits, early(**batch).logits)
        _assert_same_gradients(late.train(), early.train(), batch)


@pytest.mark.parametrize("how", ["add_adapter", "inject_adapter_in_model"])
def test_adapters_of_transformers_own_integration(how):
    """Which injects layers of PEFT into the model itself."""

    def add(model: nn.Module, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        if how == "add_adapter":
            model.add_adapter(METHODS["lora"](), name)
        else:
            peft.inject_adapter_in_model(METHODS["lora"](), model, name)

    late, early = models.stock_model("small"), _fast("int8")
    try:
        for model in (late, early):
            add(model, "first", seed=5)
    except ValueError as error:
        pytest.skip(str(error))  # this transformers wants another PEFT
    qvl_model.accelerate(late, weights="int8")
    assert _same(_bits(late), _bits(early)) and _quantised(late)
    with qvl_kernels.use_backend("reference"):
        _assert_same_gradients(late.train(), early.train(), _batch())
        for model in (late, early):
            add(model, "second", seed=6)
        _assert_same_gradients(late.train(), early.train(), _batch())
    assert any(".second." in name and p.requires_grad for name, p in late.named_parameters())


def test_modules_of_the_user_stay():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = models.stock_model("small")
    model.value_head, model.model.language_model.probe = nn.Linear(64, 1), nn.Linear(64, 64)
    layer = model.model.language_model.layers[1]
    layer.mlp.up_proj.__class__ = Doubled
    layer.mlp.gate_proj = torch.nn.utils.parametrizations.weight_norm(layer.mlp.gate_proj)
    kept = {
        "value_head": model.value_head,
        "probe": model.model.language_model.probe,
        "up": layer.mlp.up_proj,
        "gate": layer.mlp.gate_proj,
    }
    types = {name: type(module) for name, module in kept.items()}
    weights = {name: module.weight.clone() for name, module in kept.items()}
    qvl_model.accelerate(model, weights="int8")
    for name, module in kept.items():
        assert (
            issubclass(type(module), types[name])
            and not isinstance(module, PackedLinear)
            and torch.equal(module.weight, weights[name])
        )
    assert isinstance(layer.mlp.down_proj, PackedLinear) and isinstance(model.lm_head, PackedLinear)


@pytest.mark.parametrize("pattern", ["*value_head", "model.language_model.prob[e]"])
def test_modules_of_the_user_that_are_named(pattern):
    """A pattern that matches nothing else means them."""
    model = models.stock_model("small")
    model.value_head, model.model.language_model.probe = nn.Linear(64, 5), nn.Linear(64, 64)
    heads = {"value_head": model.value_head, "probe": model.model.language_model.probe}
    named = next(name for name in heads if name[:4] in pattern)
    x = torch.randn(7, 64)
    expected = {name: module(x) for name, module in heads.items()}
    qvl_model.accelerate(model, weights={pattern: "int8"})
    for name, module in heads.items():
        assert isinstance(module, PackedLinear) == (name == named)
        assert models.relative(module(x), expected[name]) < (2e-2 if name == named else 1e-6)
    assert not isinstance(model.lm_head, PackedLinear)
    with pytest.raises(ValueError, match="matches no linear layer"):
        qvl_model.accelerate(models.stock_model("small"), weights={pattern: "int8"})


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("method", MERGED)
def test_merging_and_unmerging(method, weights):
    """Merging is: dequantise, merge, quantise."""
    fast = _fast(weights)
    stock, batch = _stock(fast), _batch()
    tuned, expected = (_adapted(model, METHODS[method]()) for model in (fast, stock))
    bits, copied = _bits(tuned), pickle.loads(pickle.dumps(copy.deepcopy(tuned)))
    with torch.no_grad():
        before = tuned(**batch).logits
        for safe in (False, True):
            for model in (tuned, expected, copied):
                model.merge_adapter(safe_merge=safe)
            if weights is None:
                assert_close(tuned(**batch).logits, expected(**batch).logits)
            elif method != "tied":  # where two are merged into one weight, one after the other
                modules = dict(expected.named_modules())
                for name, module in _quantised(tuned).items():
                    again = quantize(modules[name].weight.data, **module.quantized.options)
                    assert relative(module.dequantize(), dequantize(again)) < 1e-6, name
            if weights is not None:
                assert not _same(_bits(tuned), bits) and relative(tuned(**batch).logits, expected(**batch).logits) < 0.2
            copied = copy.deepcopy(copied)
            for model in (tuned, expected, copied):
                model.unmerge_adapter()
            assert _same(_bits(tuned), bits) and _same(_bits(copied), bits)
        assert_close(tuned(**batch).logits, before, limit=1e-5 if weights is None else 0)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_merging_for_good(tmp_path, weights):
    fast, batch = _fast(weights), _batch()
    stock = _stock(fast)
    with torch.no_grad():
        fast(**batch)  # prepared state is of the old weights
        merged, expected = (_adapted(model, METHODS["lora"]()).merge_and_unload() for model in (fast, stock))
        assert merged is fast and not any("lora" in name for name, _ in merged.named_modules())
        logits = merged(**batch).logits
        merged.save_pretrained(tmp_path)
        again = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(again(**batch).logits, logits) and _same(_bits(again), _bits(merged))
        if weights is None:
            assert_close(logits, expected(**batch).logits)
            return
        for name, module in _quantised(merged).items():
            assert (
                relative(
                    module.dequantize(),
                    dequantize(quantize(expected.get_submodule(name).weight.data, **module.quantized.options)),
                )
                < 1e-6
            )
        assert all(module._kept.original is None for module in _quantised(merged).values())
        second = _adapted(merged, METHODS["lora"]())  # one after the other
        bits = _bits(second)
        second.merge_adapter()
        second.unmerge_adapter()
        assert _same(_bits(second), bits)


def test_two_adapters_merged_at_once():
    tuned = _adapted(_fast("int8"), METHODS["lora"]())
    tuned.add_adapter("other", METHODS["lora"]())
    bits = _bits(tuned)
    tuned.base_model.set_adapter(["default", "other"])
    tuned.merge_adapter()
    assert not _same(_bits(tuned), bits)
    tuned.unmerge_adapter()
    assert _same(_bits(tuned), bits)
    tuned.merge_adapter(["default"])
    one = _bits(tuned)
    tuned.merge_adapter(["other"])
    assert not _same(_bits(tuned), one)
    with torch.no_grad(), tuned.disable_adapter():
        tuned(**_batch())  # which unmerges
    assert _same(_bits(tuned), bits)


def test_an_unmerge_without_the_original_is_an_error():
    tuned = _adapted(_fast("int8"), METHODS["lora"]())
    layer = tuned.base_model.model.model.language_model.layers[0].mlp.down_proj
    tuned.merge_adapter()
    layer.base_layer.weight.data = 2 * layer.base_layer.weight.data
    with pytest.raises(RuntimeError, match="was not kept; load the model again"):
        tuned.unmerge_adapter()
    merged = _adapted(models.stock_model("small"), METHODS["lora"]())
    merged.merge_adapter()
    with pytest.raises(
        ValueError, match=r"an adapter is merged into .*call unmerge_adapter first, or merge_and_unload"
    ):
        qvl_model.accelerate(merged, weights="int8")
    assert not _quantised(merged)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "lora and tokens", "prompt", "copies"])
def test_an_adapter_is_saved_and_reloaded(tmp_path, method):
    tuned, batch = _adapted(_fast("int8"), METHODS[method]()), _batch(image=method != "prompt")
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(_fast("int8"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, tuned(**batch).logits)
    if method != "prompt":
        with pytest.raises(ValueError, match="save them through PEFT, or merge_and_unload first"):
            tuned.get_base_model().save_pretrained(tmp_path / "base")
        assert not (tmp_path / "base").exists()


def test_saving_with_modules_of_the_user(tmp_path):
    model = _fast("int8")
    model.value_head = nn.Linear(64, 1)
    with pytest.raises(
        ValueError,
        match="save: value_head.bias and 1 other tensors are no part of a plain Qwen3VLForConditionalGeneration",
    ):
        model.save_pretrained(tmp_path)
    model.save_pretrained(
        tmp_path, state_dict={name: tensor for name, tensor in model.state_dict().items() if "value_head" not in name}
    )
    again, batch = qvl_model.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path), _batch()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("method", [None, "lora", "tied", "lora and tokens", "prompt"])
def test_restore_under_adapters(tmp_path, method):
    from transformers import Qwen3VLForConditionalGeneration

    models.stock_model("small").save_pretrained(tmp_path)
    fast, stock = (Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32) for _ in range(2))
    fast.model.visual.requires_grad_(False)
    stock.model.visual.requires_grad_(False)
    qvl_model.accelerate(fast, weights={"text": "int8", "vision": "int4", "lm_head": "int8"})
    tuned, expected = (_adapted(model, METHODS[method]()) if method else model for model in (fast, stock))
    if method in MERGED:
        tuned.merge_adapter()
        with pytest.raises(ValueError, match="unmerge its adapters"):
            qvl_model.restore(tuned)
        tuned.unmerge_adapter()
    qvl_model.restore(tuned)
    assert [type(module) for module in tuned.modules()] == [type(module) for module in expected.modules()]
    parameters, others = (dict(model.named_parameters()) for model in (tuned, expected))
    assert {name: p.requires_grad for name, p in parameters.items()} == {
        name: p.requires_grad for name, p in others.items()
    }
    assert all(
        torch.equal(p, others[name])
        for name, p in parameters.items()
        if "lora" not in name and p.requires_grad is False
    )


@pytest.mark.parametrize("method", ["dora", "loha", "ia3", "lora and tokens"])
def test_bf16(method):
    """As close to fp32 as stock, with adapters of the same dtypes."""
    batch, golden = _batch(), _adapted(models.stock_model("small"), METHODS[method]())
    stock, fast, quantised = (
        _adapted(model, METHODS[method]())
        for model in (
            models.stock_model("small", torch.bfloat16),
            _fast(dtype=torch.bfloat16),
            _fast("int8", dtype=torch.bfloat16),
        )
    )
    expected = {name: p.dtype for name, p in stock.named_parameters() if p.requires_grad}
    for tuned in (fast, quantised):
        assert {name: p.dtype for name, p in tuned.named_parameters() if p.requires_grad} == expected
    for model in (golden, stock, fast):  # random numbers differ with the dtype
        model.load_state_dict(stock.state_dict())
    for merged in (False, True) if method in MERGED else (False,):
        with torch.no_grad():
            if merged:
                for model in (golden, stock, fast):
                    model.merge_adapter()
            exact = golden(**batch).logits
            errors = [relative(model(**batch).logits, exact) for model in (stock, fast)]
        assert 0 < errors[1] < 1.3 * errors[0]
    loss = quantised.train()(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in quantised.parameters() if p.requires_grad)


def test_target_parameters_of_a_quantised_layer_are_refused():
    model = qvl_model.accelerate(models.stock_model("small"), weights="int8")
    with pytest.raises(TypeError, match="train an adapter of its layer .target_modules."):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]))(
            input_ids=torch.tensor([[3, 4]])
        )
