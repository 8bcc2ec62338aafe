"""Every argument of forward and generate, and user changes to a model, give stock's results."""

import copy
import io
import pickle
import threading

import pytest
import torch
from models import CONFIGS, Elsewhere, assert_all_fused, assert_close, fused_calls, inputs, pair, stock_model
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

import qvl_model
from qvl_model.compat import CACHE

MIXED = ([3, (1, 4, 6), 5], [2, (1, 2, 4), 3, (2, 4, 4), 1])


@pytest.fixture
def fresh():
    return pair("small")


@torch.no_grad()
def _logits(model, batch, **options):
    return model(**batch, **options).logits


def _assert_greedy_equal(stock, fast, batch, new_tokens: int = 5, **options):
    options = dict(max_new_tokens=new_tokens, do_sample=False) | options
    assert torch.equal(fast.generate(**batch, **options), stock.generate(**batch, **options))


# --- arguments of forward -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(models, padding):
    batch = inputs(*MIXED, padding=padding)
    seen = batch["attention_mask"].bool()
    assert_close(_logits(models[1], batch)[seen], _logits(models[0], batch)[seen])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config(name):
    stock, fast = pair(name)
    batch = inputs([3, (1, 4, 6), 5])
    with fused_calls(fast) as calls:
        got = _logits(fast, batch)
    assert_close(got, _logits(stock, batch))
    assert_all_fused(calls, vision=True)


def test_labels(models):
    batch = inputs(*MIXED)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        ours, theirs = (model(**batch, labels=labels) for model in models[::-1])
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert_close(ours.logits, theirs.logits)


def test_inputs_embeds(models):
    ids = inputs([7], [4])
    embeds = models[0].get_input_embeddings()(ids.pop("input_ids"))
    assert_close(_logits(models[1], ids, inputs_embeds=embeds), _logits(models[0], ids, inputs_embeds=embeds))
    _assert_greedy_equal(*models, ids | {"inputs_embeds": embeds})


@pytest.mark.parametrize("rows", [2, 3, 4], ids=["text", "t h w", "text and t h w"])
def test_position_ids(models, rows):
    positions = torch.randint(0, 50, (rows, 2, 6), generator=torch.Generator().manual_seed(2))
    if rows == 4:
        positions[0] = torch.arange(6)
    positions = positions[0] if rows == 2 else positions
    batch = {"input_ids": inputs([6], [6])["input_ids"], "position_ids": positions}
    assert_close(_logits(models[1], batch), _logits(models[0], batch))


def test_varlen_sequences(models):
    """Varlen: positions that restart mean several sequences in one row; transformers then masks between them."""
    batch = {
        "input_ids": inputs([9])["input_ids"],
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]]).expand(4, 1, -1),
    }
    assert_close(_logits(models[1], batch, use_cache=False), _logits(models[0], batch, use_cache=False))


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 5])], ids=str)
def test_logits_to_keep(models, keep):
    batch = inputs([9], [5])
    got = _logits(models[1], batch, logits_to_keep=keep)
    assert got.shape[1] == (keep if isinstance(keep, int) else len(keep))
    assert_close(got, _logits(models[0], batch, logits_to_keep=keep))


def test_output_hidden_states(fresh):
    batch = inputs(*MIXED)
    with torch.no_grad():
        theirs, ours = (model(**batch, output_hidden_states=True) for model in fresh)
    assert len(ours.hidden_states) == len(fresh[0].model.language_model.layers) + 1
    for got, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(got, expected)
    with fused_calls(fresh[1]) as calls:  # the recorder stays installed; the fast path stays eligible
        _logits(fresh[1], batch)
    assert_all_fused(calls, vision=True)


def test_output_attentions_under_eager():
    stock, fast = pair("small", attention="eager")
    batch = inputs([4, (1, 2, 4), 3], [6])
    assert_close(_logits(fast, batch), _logits(stock, batch))
    with torch.no_grad():
        theirs, ours = (model(**batch, output_attentions=True, output_hidden_states=True) for model in (stock, fast))
    assert len(ours.attentions) == len(fast.model.language_model.layers)
    for got, expected in zip(
        ours.attentions + ours.hidden_states, theirs.attentions + theirs.hidden_states, strict=True
    ):
        assert_close(got, expected)
    _assert_greedy_equal(stock, fast, batch)


def test_output_attentions_in_generate():
    stock, fast = pair("small", attention="eager")
    options = dict(max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True)
    ours, theirs = (model.generate(**inputs([5], [3]), **options) for model in (fast, stock))
    for our_step, their_step in zip(ours.attentions, theirs.attentions, strict=True):
        for got, expected in zip(our_step, their_step, strict=True):
            assert_close(got, expected)


def test_switching_the_attention_implementation(fresh):
    stock, fast = fresh
    batch = inputs(*MIXED)
    for implementation in ("eager", "sdpa"):
        stock.set_attn_implementation(implementation)
        fast.set_attn_implementation(implementation)
        assert_close(_logits(fast, batch), _logits(stock, batch))


@pytest.mark.parametrize("kind", ["bool", "additive", "per head"])
def test_own_four_dimensional_mask(models, kind):
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(2, 6 if kind == "per head" else 1, 7, 7, generator=generator) < 0.6
    seen |= torch.eye(7, dtype=torch.bool)
    mask = seen if kind != "additive" else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    batch = {
        "input_ids": inputs([7], [7])["input_ids"],
        "attention_mask": mask,
        "position_ids": torch.arange(7).expand(2, -1),
    }
    assert_close(_logits(models[1], batch), _logits(models[0], batch))


@pytest.mark.parametrize(
    "make",
    [lambda config: DynamicCache(), lambda config: StaticCache(config=config, max_cache_len=32)],
    ids=["dynamic", "static"],
)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_cache_filled_in_chunks(models, make, padded):
    batch = inputs([12], [8 if padded else 12])
    results = []
    for model in models[::-1]:
        cache, parts = make(model.config.text_config), []
        for start, end in ((0, 5), (5, 6), (6, 9), (9, 10), (10, 12)):
            with torch.no_grad():
                out = model(
                    input_ids=batch["input_ids"][:, start:end],
                    attention_mask=batch["attention_mask"][:, :end],
                    **{CACHE: cache},
                    use_cache=True,
                )
            parts.append(out.logits)
            assert cache.get_seq_length() == end
        results.append(torch.cat(parts, 1))
    assert_close(*results)
    assert_close(results[0][:, -1], _logits(models[0], batch)[:, -1])


def test_stock_layers_see_what_ours_wrote(models):
    """One cache may go from the accelerated to the stock model and back."""
    stock, fast = models
    batch, cache, parts = inputs([10])["input_ids"], DynamicCache(), []
    for index in range(10):
        parts.append(_logits(models[index % 2], {"input_ids": batch[:, index : index + 1]}, **{CACHE: cache}))
    assert_close(torch.cat(parts, 1), _logits(stock, {"input_ids": batch}))


def test_inference_tensors_in_a_cache_that_goes_on_outside(models):
    stock, fast = models
    ids, cache = inputs([6])["input_ids"], DynamicCache()
    with torch.inference_mode():
        fast(input_ids=ids[:, :4], **{CACHE: cache})
    got = _logits(fast, {"input_ids": ids[:, 4:]}, **{CACHE: cache})
    assert_close(got, _logits(stock, {"input_ids": ids})[:, 4:])


# --- arguments of generate ------------------------------------------------------------------------------------------


def test_prompt_lookup(models):
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    _assert_greedy_equal(*models, {"input_ids": ids}, new_tokens=12, prompt_lookup_num_tokens=4)


def test_assistant_model(models):
    assistant = stock_model("small")
    _assert_greedy_equal(*models, {"input_ids": inputs([8])["input_ids"]}, new_tokens=8, assistant_model=assistant)


def test_beam_sampling_and_several_sequences(models):
    batch, results = inputs(*MIXED), []
    for model in models:
        torch.manual_seed(3)
        results.append(model.generate(**batch, max_new_tokens=6, do_sample=True, num_beams=3, num_return_sequences=2))
    assert torch.equal(*results)


def test_streamer(models):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    batch, streams = inputs([4, (1, 4, 4), 3]), []
    for model in models:
        streams.append(Collector())
        model.generate(**batch, max_new_tokens=5, do_sample=False, streamer=streams[-1])
    assert streams[0].tokens == streams[1].tokens and streams[1].ended


def test_multi_turn_on_a_kept_cache(models):
    turns, results = [inputs([5, (1, 4, 6), 3]), [11, 12, 13], [21, 22]], []
    for model in models:
        options = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        out = model.generate(**turns[0], **options)
        for turn in turns[1:]:
            ids = torch.cat([out.sequences, torch.tensor([turn])], 1)
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{CACHE: out[CACHE]}, **options)
        results.append(out.sequences)
    assert torch.equal(*results)


def test_long_generation_grows_the_cache(models):
    _assert_greedy_equal(*models, inputs([3]), new_tokens=300)


# --- what users do to a model ---------------------------------------------------------------------------------------


def _assert_same_after(stock, fast, limit: float = 2e-5, batch=None):
    batch = batch or inputs(*MIXED)
    seen = batch["attention_mask"].bool()
    assert_close(_logits(fast, batch)[seen], _logits(stock, batch)[seen], limit)


HOOKED = [
    "model.language_model.layers.1",
    "model.language_model.layers.1.self_attn",
    "model.language_model.layers.1.self_attn.k_proj",
    "model.language_model.layers.1.self_attn.q_norm",
    "model.language_model.layers.1.input_layernorm",
    "model.language_model.layers.1.mlp",
    "model.language_model.layers.1.mlp.act_fn",
    "model.language_model.layers.1.mlp.down_proj",
    "model.visual.blocks.1",
    "model.visual.blocks.1.attn",
    "model.visual.blocks.1.attn.qkv",
    "model.visual.blocks.1.norm2",
    "model.visual.blocks.1.mlp",
    "model.visual.blocks.1.mlp.act_fn",
    "model.visual.patch_embed.proj",
    "lm_head",
]


@pytest.mark.parametrize("name", HOOKED)
def test_forward_hooks(fresh, name):
    calls = []
    for model in fresh:
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda module, args, out: (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5
        )
        module.register_forward_pre_hook(lambda module, args: calls.append(id(module)))
    plain = _logits(stock_model("small"), inputs(*MIXED))
    _assert_same_after(*fresh)
    counts = [calls.count(id(model.get_submodule(name))) for model in fresh]
    assert counts[0] == counts[1] > 0
    assert not torch.allclose(_logits(fresh[1], inputs(*MIXED)), plain)


def test_global_hooks(fresh):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        for model in fresh:
            seen.append("start")
            _logits(model, inputs([4, (1, 2, 2)]))
    finally:
        handle.remove()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


@pytest.mark.parametrize(
    "change", ["activation", "vision activation", "forward", "not causal", "norm eps", "scaling", "bias"]
)
def test_edited_layers(fresh, change):
    plain = _logits(fresh[0], inputs([9]) if change != "vision activation" else inputs(*MIXED))
    for model in fresh:
        layer, block = model.model.language_model.layers[1], model.model.visual.blocks[1]
        if change == "activation":
            layer.mlp.act_fn = nn.ReLU()
        elif change == "vision activation":
            block.mlp.act_fn = nn.ReLU()
        elif change == "forward":
            layer.mlp.forward = lambda x: x
        elif change == "not causal":
            layer.self_attn.is_causal = False
        elif change == "norm eps":
            layer.self_attn.q_norm.variance_epsilon = 0.5
        elif change == "scaling":
            layer.self_attn.scaling = 0.9
        else:
            layer.mlp.down_proj.bias = nn.Parameter(torch.ones(64))
    batch = inputs([9]) if change != "vision activation" else inputs(*MIXED)
    _assert_same_after(*fresh, batch=batch)
    assert not torch.allclose(_logits(fresh[1], batch), plain)


def test_parametrization(fresh):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    for model in fresh:
        nn.utils.parametrize.register_parametrization(
            model.model.language_model.layers[0].self_attn.v_proj, "weight", Doubled()
        )
    _assert_same_after(*fresh)


@pytest.mark.parametrize("cast", ["to", "half", "bfloat16"])
def test_casts_in_place(fresh, cast):
    stock, fast = fresh
    for model in fresh:
        model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    with fused_calls(fast) as calls:
        got = _logits(fast, inputs(*MIXED))
    assert got.dtype == (torch.float16 if cast == "half" else torch.bfloat16)
    assert_all_fused(calls, vision=True)
    _assert_same_after(stock, fast, limit=0.05)
    for model in fresh:
        model.float()
    _assert_same_after(stock, fast)


def test_float64_after_acceleration(fresh):
    for model in fresh:
        model.double()
    _assert_same_after(*fresh, limit=1e-12)


def test_autocast(fresh):
    batch = inputs(*MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (_logits(model, batch) for model in fresh[::-1])
    assert_close(got, expected, 0.03)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(fresh, assign):
    state = stock_model("small", seed=5).state_dict()
    for model in fresh:
        model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assign)
    _assert_same_after(*fresh)


def test_edited_parameters(fresh):
    for model in fresh:
        with torch.no_grad():
            model.model.language_model.layers[0].mlp.up_proj.weight.mul_(3)
        model.model.language_model.layers[1].self_attn.q_proj.weight = nn.Parameter(torch.ones(64, 64))
        model.model.visual.blocks[0].mlp.linear_fc1.weight.data = torch.ones(64, 32)
    _assert_same_after(*fresh)


def test_resize_token_embeddings(fresh):
    for model in fresh:
        torch.manual_seed(0)
        model.resize_token_embeddings(170, mean_resizing=False)
    assert fresh[1].lm_head.weight is fresh[1].get_input_embeddings().weight
    _assert_same_after(*fresh)
    _assert_greedy_equal(*fresh, inputs(*MIXED))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(fresh, how):
    stock, fast = fresh
    if how == "deepcopy":
        other = copy.deepcopy(fast)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fast))
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        fast.lm_head.weight.zero_()  # the copy has weights of its own
    assert qvl_model.is_accelerated(other)
    with fused_calls(other) as calls:
        _assert_same_after(stock, other)
    assert_all_fused(calls, vision=True)
    _assert_same_after(stock, qvl_model.restore(other))


def test_two_threads_on_one_model(models):
    stock, fast = models
    # transformers keeps rope_deltas on the model: only prompts of the same deltas are safe in two threads of stock,
    # too.
    batches = [inputs([7, (1, 4, 6), 2], seed=1), inputs([3, (1, 4, 6), 9], seed=2)]
    expected = [stock.generate(**batch, max_new_tokens=20, do_sample=False) for batch in batches]
    results: dict[int, list] = {0: [], 1: []}

    def work(index):
        for _ in range(4):
            results[index].append(fast.generate(**batches[index], max_new_tokens=20, do_sample=False))

    threads = [threading.Thread(target=work, args=(index,)) for index in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, outs in results.items():
        assert len(outs) == 4 and all(torch.equal(out, expected[index]) for out in outs)


def test_torch_compile(fresh):
    stock, fast = fresh
    compiled = torch.compile(fast.model.language_model, backend="aot_eager")
    embeds = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stock.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        assert_close(compiled(inputs_embeds=embeds, use_cache=False).last_hidden_state, expected)
    embeds.requires_grad_()
    gradients = []
    for text in (compiled, stock.model.language_model):
        (gradient,) = torch.autograd.grad(
            text(inputs_embeds=embeds, use_cache=False).last_hidden_state.square().sum(), embeds
        )
        gradients.append(gradient)
    assert_close(*gradients, 1e-4)


@pytest.mark.slow
def test_torch_compile_whole_model_and_static_cache(fresh):
    stock, fast = fresh
    batch = inputs([3, (1, 4, 6), 5])
    fast.forward = torch.compile(fast.forward)
    _assert_greedy_equal(stock, fast, batch)
    _assert_greedy_equal(stock, fast, batch, cache_implementation="static")


def test_vision_attentions_are_recorded_when_asked_for(fresh):
    batch = inputs([(1, 4, 6), 2])
    pixels, grid = batch["pixel_values"], batch["image_grid_thw"]
    with torch.no_grad():
        theirs, ours = (model.model.visual(pixels, grid, output_attentions=True) for model in fresh)
        assert len(ours.attentions) == len(theirs.attentions)
        for got, expected in zip(ours.attentions, theirs.attentions, strict=True):
            assert_close(got, expected)
        with fused_calls(fresh[1]) as calls:
            fresh[1].model.visual(pixels, grid)
    assert calls.fused["vision_block"] == calls.expected["vision_block"] > 0


def test_weights_that_are_tensor_subclasses(fresh):
    """Their data pointer must never reach a kernel."""
    for model in fresh:
        for module in (
            model.model.language_model.layers[0].mlp.up_proj,
            model.model.visual.blocks[0].attn.proj,
            model.lm_head,
        ):
            held = module.weight.detach().clone()
            module._parameters["weight"] = Elsewhere(held) if model is fresh[1] else held
    _assert_same_after(*fresh)
