"""attn_implementation="qvl" in other models of transformers: what "sdpa" computes, or an error."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import qvl_kernels
from qvl_model import attention

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=None,
)
MODELS = {
    "llama": {},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": 5},
    "granite": {"attention_multiplier": 0.4},
}


@pytest.fixture
def calls(monkeypatch):
    """The number of calls of our attention."""
    found = []
    ours = qvl_kernels.attention
    monkeypatch.setattr(qvl_kernels, "attention", lambda *args, **kwargs: found.append(1) or ours(*args, **kwargs))
    return found


def _pair(name, dtype=torch.float32, **options):
    models = []
    for implementation in ("sdpa", "qvl"):
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **SIZES | MODELS.get(name, {}) | options)
        models.append(AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype).eval())
    return models


def _inputs():
    ids = torch.randint(1, 99, (2, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, masked, dtype, calls):
    stock, ours = _pair(name, dtype)
    batch = _inputs() if masked else {"input_ids": _inputs()["input_ids"]}
    visible = batch.get("attention_mask", torch.ones(2, 17)).bool()
    found = []
    for model in (stock, ours):
        logits = model(**batch).logits[visible].float()
        logits.logsumexp(-1).sum().backward()
        found.append([logits.detach(), *(parameter.grad.float() for parameter in model.parameters())])
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()
    assert len(calls) == SIZES["num_hidden_layers"]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", MODELS)
def test_generation(name, cache, calls):
    stock, ours = _pair(name)
    tokens = [
        model.generate(**_inputs(), max_new_tokens=9, do_sample=False, cache_implementation=cache)
        for model in (stock, ours)
    ]
    assert torch.equal(*tokens) and calls


def test_a_prompt_in_a_static_cache_without_a_mask(calls):
    stock, ours = _pair("llama")
    ids = _inputs()["input_ids"]
    outputs = [
        model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=40)).logits
        for model in (stock, ours)
    ]
    assert (outputs[0] - outputs[1]).norm() <= 2e-5 * outputs[0].norm() and calls


def test_several_tokens_over_a_cache(calls):
    stock, ours = _pair("llama")
    ids = _inputs()["input_ids"]
    found = []
    for model in (stock, ours):
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :11], past_key_values=cache)
        found.append(model(input_ids=ids[:, 11:], past_key_values=cache).logits)
    assert (found[0] - found[1]).norm() <= 2e-5 * found[0].norm() and calls


def test_what_the_kernels_do_not_take_goes_to_sdpa(calls, monkeypatch):
    stock, ours = _pair("llama", attention_dropout=0.3)
    seen = []
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *a, **k: seen.append(1) or sdpa_attention_forward(*a, **k)
    )
    logits = []
    for model in (stock, ours):
        torch.manual_seed(5)
        logits.append(model.train()(**_inputs()).logits)
    assert torch.equal(*logits) and len(seen) == 3 and not calls
    for model in (stock, ours):
        model.eval().double()
    assert torch.equal(stock(**_inputs()).logits, ours(**_inputs()).logits) and len(seen) == 6


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "head_mask"])
def test_what_it_does_not_compute_is_an_error(argument):
    q = torch.randn(1, 4, 5, 16)
    with pytest.raises(ValueError, match=f"no {argument}"):
        attention.attention_forward(torch.nn.Module(), q, q, q, None, **{argument: 1.0})


def test_softcapped_models_are_refused():
    config = AutoConfig.for_model("gemma2", **SIZES, head_dim=16, attn_logit_softcapping=30.0)
    ours = AutoModelForCausalLM.from_config(config, attn_implementation="qvl")
    with pytest.raises(ValueError, match="models that support 'sdpa', which Gemma2Model does not|has no softcap"):
        ours(**_inputs())


@pytest.mark.parametrize(
    ("case", "shapes", "scaling"),
    [("more queries than keys", (9, 7), None), ("a scale in a tensor", (7, 7), torch.tensor(0.3))],
)
def test_calls_that_only_sdpa_computes(case, shapes, scaling, calls):
    q, kv = torch.randn(2, 4, shapes[0], 16), torch.randn(2, 4, shapes[1], 16)
    options = {"scaling": None if scaling is None else float(scaling)}
    ours, _ = attention.attention_forward(torch.nn.Module(), q, kv, kv, None, scaling=options["scaling"])
    theirs, _ = sdpa_attention_forward(torch.nn.Module(), q, kv, kv, None, **options)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm() and (not calls or case != "more queries than keys")


@pytest.mark.parametrize("name", ["bloom", "xglm"])
def test_models_without_sdpa_are_refused(name):
    config = AutoConfig.for_model(name, hidden_size=32, n_layer=1, num_layers=1, n_head=2, vocab_size=99, d_model=32,
                                  ffn_dim=32, attention_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="qvl")
    with pytest.raises(ValueError, match="models that support 'sdpa'"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_an_unmasked_encoder(calls):
    q, k, v = torch.randn(3, 2, 4, 7, 16)
    module = torch.nn.Module()
    module.is_causal = False
    ours, weights = attention.attention_forward(module, q, k, v, None)
    theirs, _ = sdpa_attention_forward(module, q, k, v, None)
    assert weights is None and (ours - theirs).norm() < 1e-5 * theirs.norm() and calls
