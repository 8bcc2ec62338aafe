"""What users change on the model, or while ``generate`` runs, counts as in stock, by the CPU's and the GPU's step."""

import contextlib

import pytest
import qvl_models
import torch
from generation_runs import logits_of, same_logits
from gpu_steps import offer
from models import assert_close, inputs, pair
from torch import nn
from transformers import DynamicCache, TemperatureLogitsWarper
from transformers.generation.streamers import BaseStreamer, TextStreamer
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock_module

import qvl_model
from qvl_kernels.ops.decoder_layer import prepared
from qvl_model.compat import CACHE, CHECKPOINTING
from qvl_model.generation import step_cpu


@pytest.fixture(params=["CPU step", "GPU step"])
def step(request, monkeypatch):
    if request.param == "GPU step":
        offer(monkeypatch)


class _Streamer(BaseStreamer):
    def __init__(self, each):
        self.each, self.count = each, 0

    def put(self, value):
        self.count += 1
        self.each(self.count)

    def end(self):
        pass


def test_a_streamer_changes_processors_and_criteria(step, monkeypatch):
    outs = []
    for model in pair("odd"):
        get = model._get_logits_processor
        seen = []
        monkeypatch.setattr(
            model, "_get_logits_processor", lambda *a, get=get, seen=seen, **k: seen.append(get(*a, **k)) or seen[0]
        )

        def anneal(count, seen=seen):
            for processor in seen[0] if seen else ():  # the prompt comes first
                if isinstance(processor, TemperatureLogitsWarper):
                    processor.temperature = 0.05 + 0.3 * count

        torch.manual_seed(3)
        outs.append(
            model.generate(
                **inputs([9]), do_sample=True, temperature=5.0, top_k=40, max_new_tokens=12, streamer=_Streamer(anneal)
            )
        )
    assert torch.equal(*outs)


class _Halved(nn.Module):
    def forward(self, x):
        return x / 2


class _Rotary(nn.Module):
    """Without the attributes of stock's."""

    def __init__(self, stock):
        super().__init__()
        self.stock = [stock]

    def forward(self, *args):
        cos, sin = self.stock[0](*args)
        return cos.flip(-1), sin


def _fewer_heads(model):
    attention = model.model.language_model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        linear = getattr(attention, name)
        linear.weight = nn.Parameter(linear.weight[: attention.head_dim].clone())
        linear.bias = None
    attention.num_key_value_groups = model.config.text_config.num_attention_heads


def _embedding(model):
    get = type(model.model).get_input_embeddings

    class Scaled(nn.Module):
        def forward(self, ids):
            return get(model.model)(ids) * 1.5

    model.model.get_input_embeddings = lambda: Scaled()


def _loop(model):
    @contextlib.contextmanager
    def doubled(*_, **__):
        handle = model.model.language_model.layers[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
        try:
            yield
        finally:
            handle.remove()

    model._optimize_model_for_decode = doubled


def _ends_early(model):
    unfinished, count = model._has_unfinished_sequences, []
    model._has_unfinished_sequences = lambda *a, **k: count.append(1) or len(count) < 6 and unfinished(*a, **k)


CHANGES = {
    "final norm is the identity": lambda model: setattr(model.model.language_model, "norm", nn.Identity()),
    "final norm without weight": lambda model: setattr(
        model.model.language_model, "norm", nn.LayerNorm(72, elementwise_affine=False)
    ),
    "final norm of a user": lambda model: setattr(model.model.language_model, "norm", _Halved()),
    "rotary embedding of a user": lambda model: setattr(
        model.model.language_model, "rotary_emb", _Rotary(model.model.language_model.rotary_emb)
    ),
    "a layer with fewer key/value heads": _fewer_heads,
    "another embedding": _embedding,
    "a function around the loop": _loop,
    "a function that ends the loop": _ends_early,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_model_counts(name, step):
    models = pair("odd")
    before = logits_of(models[1])
    for model in models:
        if not hasattr(model, "_optimize_model_for_decode") and name == "a function around the loop":
            return  # not in this version
        CHANGES[name](model)
    if name == "a function that ends the loop":
        assert len(logits_of(models[0])) == len(logits_of(models[1])) < 12
        return
    same_logits(models)
    after = logits_of(models[0])
    assert after.shape != before.shape or not torch.allclose(after, before, atol=1e-3)
    assert qvl_model.report(models[1]).decoding


PATCHES = {
    "apply_rotary_pos_emb": lambda own: lambda q, k, *args, **kwargs: own(q, k * 0.5, *args, **kwargs),
    "create_causal_mask": lambda own: (
        lambda **kwargs: None if (mask := own(**kwargs)) is None else mask if mask.dtype is torch.bool else mask * 0.5
    ),
}
CLASSES = ["TextAttention", "TextDecoderLayer", "TextMLP", "TextRMSNorm", "VisionBlock", "VisionMLP", "VisionAttention"]


@pytest.mark.parametrize("name", [*PATCHES, *CLASSES])
def test_patches_of_transformers_count(name, step, monkeypatch):
    """Also those that come after ``accelerate``; and their end."""
    models = pair("odd")
    batch = inputs([3, (1, 4, 6), 4])
    before = logits_of(models[0], batch)
    with monkeypatch.context() as patch:
        if name in PATCHES:
            patch.setattr(stock_module, name, PATCHES[name](getattr(stock_module, name)))
        else:
            kind = getattr(stock_module, f"Qwen3VL{name}")

            def halved(self, *args, own=kind.forward, **kwargs):
                out = own(self, *args, **kwargs)
                return (out[0] / 2, *out[1:]) if isinstance(out, tuple) else out / 2

            patch.setattr(kind, "forward", halved)
            for model in models:
                assert "replaced" in qvl_model.report(model).decoding or model is models[0]
        same_logits(models, batch)
        assert name == "create_causal_mask" or not torch.allclose(logits_of(models[0], batch), before, atol=1e-3)
    same_logits(models, batch)


class _Tokenizer:
    """Not callable, and of the user's."""

    def __init__(self, each):
        self.each, self.count = each, 0

    def decode(self, ids, **_):
        self.count += 1
        self.each(self.count)
        return ""


def test_a_tokenizer_of_a_streamer_changes_the_model(step, capsys):
    outs = []
    for model in pair("odd"):

        def hook(count, model=model):
            if count == 3:
                layer = model.model.language_model.layers[1]
                layer.register_forward_hook(lambda module, args, out: 1.7 * out)

        outs.append(logits_of(model, streamer=TextStreamer(_Tokenizer(hook))))
    assert_close(outs[1], outs[0])


@pytest.mark.parametrize("where", ["embed_tokens", "rotary_emb", "norm"])
def test_a_hook_changes_the_model_while_a_token_is_computed(where, step):
    outs = []
    for model in pair("odd"):
        body, count = model.model.language_model, []

        def hook(module, args, out, body=body, count=count):
            count.append(1)
            if len(count) == 4:
                for layer in body.layers:
                    layer.mlp.register_forward_hook(lambda module, args, out: 1.7 * out)

        getattr(body, where).register_forward_hook(hook)
        outs.append(logits_of(model))
    assert_close(outs[1], outs[0])


@pytest.mark.parametrize("where", ["fusion", "attention of fusion", "embed_token_types"])
def test_a_hook_of_qvl_changes_the_model_while_a_token_is_computed(where, step):
    outs = []
    for model in qvl_models.pair("mlp"):
        body, count = model.model.language_model, []
        fusion = next(layer.fusion for layer in body.layers if getattr(layer, "fusion", None) is not None)
        module = {"fusion": fusion, "attention of fusion": fusion.attn, "embed_token_types": body.embed_token_types}[
            where
        ]

        def hook(module, args, out, body=body, count=count):
            count.append(1)
            if len(count) == 4:
                for layer in body.layers:
                    layer.mlp.register_forward_hook(lambda module, args, out: 1.7 * out)

        module.register_forward_hook(hook)
        outs.append(logits_of(model, qvl_models.inputs(7), max_new_tokens=9))
    assert_close(outs[1], outs[0])


def test_recomputing_activations_in_training(step):
    """Up to transformers 5.23 stock ignores the KV cache then, also without gradients."""
    caches, outs = [], []
    for model in pair("odd"):
        getattr(model, f"{CHECKPOINTING}_enable")()
        model.train()
        outs.append(logits_of(model))
        cache = DynamicCache()
        with torch.no_grad():
            steps = [model(input_ids=ids[None, None], **{CACHE: cache}).logits for ids in inputs([9])["input_ids"][0]]
        outs.append(torch.stack(steps))
        caches.append(int(cache.get_seq_length()))
    assert_close(outs[2], outs[0])
    assert_close(outs[3], outs[1])
    assert caches[0] == caches[1]


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_calls_of_the_extension_for_a_token(weights, monkeypatch):
    """All layers in one, and norm and head in one each; the prompt is short enough for one call, too."""
    model = qvl_model.accelerate(pair("odd")[0], weights=weights)
    layers, ends = [], []
    run, logits = prepared.run_to_last, step_cpu._End.logits
    monkeypatch.setattr(prepared, "run_to_last", lambda *args: layers.append(len(args[0])) or run(*args))
    monkeypatch.setattr(step_cpu._End, "logits", lambda *args: ends.append(1) or logits(*args))
    logits_of(model)
    assert layers == [len(model.model.language_model.layers)] * 12 and len(ends) == 11
