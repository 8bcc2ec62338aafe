"""QVL through the Triton kernels: the accelerated model beside the stock one, image, connector, cross-attention and
cache.
"""

import copy

import pytest
import torch
from qvl_models import inputs, pad_pixels, plain_model

import qvl_kernels
import qvl_model
from qvl_kernels import config, dispatch
from qvl_kernels.ops.attention import triton_attention
from qvl_kernels.ops.decode_attention import tiles
from qvl_model.compat import CACHE
from qvl_model.generation import step_gpu

SMALL = dict(
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    hidden_size=16,
    intermediate_size=16,
    cross_attention_layers=[0],
    vision_num_hidden_layers=1,
    vision_num_attention_heads=2,
    vision_hidden_size=16,
    vision_intermediate_size=16,
    connector_num_layers=1,
    vision_projection_dim=16,
    language_projection_dim=16,
    attention_bias=False,
    tie_word_embeddings=True,
)
LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("name", ["mlp", "attention"])
@torch.no_grad()
def test_prefill_and_a_step(device, dtype, name):
    if config.interpreted() and (dtype is not torch.float32 or name == "mlp"):
        pytest.skip("one model is enough for the interpreter, which is slow")
    plain = plain_model(name, **SMALL).to(device, dtype)
    model = qvl_model.accelerate(copy.deepcopy(plain))
    generator = torch.Generator().manual_seed(0)
    pixels = pad_pixels(torch.randn(3, 6, 9, generator=generator), torch.randn(3, 4, 4, generator=generator))
    batch = {key: value.to(device) for key, value in (inputs(4, 3, image=None) | pixels).items()}
    following = torch.tensor([[5], [6]], device=device)
    mask = torch.cat((batch["attention_mask"], torch.ones_like(following)), 1)

    def run(one):
        first = one(**batch)
        step = one(input_ids=following, attention_mask=mask, **{CACHE: first[CACHE]})
        return torch.cat((first.logits[batch["attention_mask"].bool()], step.logits[:, 0])).double()

    known, expected = dispatch.fallbacks(), run(plain)
    with qvl_kernels.use_backend("triton"):
        out = run(model)
    assert ((out - expected).norm() / expected.norm()).item() <= LIMITS[dtype]
    assert dispatch.fallbacks() == known


def test_generate(device, monkeypatch):
    """Whole decode steps; one serves all images."""
    plain_tiles = tiles.decode_attention
    monkeypatch.setattr(
        tiles, "decode_attention", lambda *args: {**plain_tiles(*args), "SPLITS": 2, "COMBINE_STEP": 2}
    )  # the interpreter is slow
    plain = plain_model("attention", **SMALL).to(device)
    model, known = qvl_model.accelerate(copy.deepcopy(plain)), dispatch.fallbacks()
    pixels = [torch.randn(3, *size, generator=torch.Generator().manual_seed(0)) for size in ((4, 8), (0, 0), (4, 4))]
    for batch in (
        inputs(2, 1, image=None) | pad_pixels(*pixels[:2]),
        inputs(2, 2, image=None) | pad_pixels(*pixels[1:]),
    ):
        batch = {name: value.to(device) for name, value in batch.items()}
        options = dict(do_sample=False, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        expected = plain.generate(**batch, **options)
        with qvl_kernels.use_backend("triton"):
            out = model.generate(**batch, **options)
        assert torch.equal(out.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    (step,) = step_gpu._pools[model]._idle
    assert step.layers_with_images == (0,) and dispatch.fallbacks() == known


def test_training_drops_attention_weights_in_the_kernels(device, launches_of):
    """In self- and cross-attention; the keep mask depends on the seed only, also in the forward that checkpointing
    repeats.
    """
    dtype = torch.float32
    model = qvl_model.accelerate(
        plain_model("attention", **SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.4).to(device, dtype)
    ).train()
    batch = {key: value.to(device) for key, value in inputs(4, 3).items()}
    launches = launches_of(triton_attention)

    def step(seed):
        torch.manual_seed(seed)
        loss = model(**batch, labels=batch["input_ids"]).loss
        return loss.item(), torch.autograd.grad(
            loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )

    known = dispatch.fallbacks()
    with qvl_kernels.use_backend("triton"):
        loss, gradients = step(0)
        assert sum(launch["mode"].DROPOUT for launch in launches) == 2  # the connector and the vision tower have none
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        repeated_loss, repeated = step(0)
    assert repeated_loss == loss
    for a, b in zip(gradients, repeated):
        assert a is b is None or ((a - b).norm() <= 1e-5 * a.norm())
    assert dispatch.fallbacks() == known
