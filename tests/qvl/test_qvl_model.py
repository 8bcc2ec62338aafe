"""The stock QVL model: inputs and outputs as specified, images padded or not, text alone, training."""

import pytest
import torch
from qvl_models import IMAGE, PATCH, VOCABULARY, config, inputs, pad_pixels, plain_model
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText

from qvl_model.qvl import QVLForConditionalGeneration, QVLModel

NAMES = ["mlp", "attention"]


@pytest.fixture(scope="module")
def models():
    return {name: plain_model(name) for name in NAMES}


def assert_close(out, expected, limit=2e-5):
    error = ((out.double() - expected.double()).norm() / expected.double().norm()).item()
    assert out.shape == expected.shape and error <= limit, f"relative error {error:.2e} > {limit:.0e}"


def assert_differ(one, other):
    assert (one - other).abs().max() > 1e-3


def images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


@torch.no_grad()
def logits(model, **batch):
    return model(**batch).logits


# --- inputs and outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_outputs_as_specified(models, name):
    model, batch = models[name], inputs(7, 5)
    out = model.model(**batch, output_hidden_states=True)
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    assert out.last_hidden_state.shape == (2, 7, width) and out.pooler_output.shape == (2, width)
    assert len(out.hidden_states) == layers + 1 and all(state.shape == (2, 7, width) for state in out.hidden_states)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    text = model.model.language_model
    types = (batch["input_ids"] == IMAGE).long()
    assert torch.equal(out.hidden_states[0], text.embed_tokens(batch["input_ids"]) + text.embed_token_types(types))
    assert out.attentions is None and out.cross_attentions is None
    whole = model(**batch)
    assert whole.logits.shape == (2, 7, VOCABULARY)
    assert torch.equal(whole.pooler_output, out.pooler_output) and torch.equal(
        whole.last_hidden_state, out.last_hidden_state
    )
    assert torch.equal(model(**batch, logits_to_keep=2).logits, whole.logits[:, -2:])
    assert isinstance(model.model(**batch, return_dict=False), tuple)


def test_33_hidden_states_of_32_layers():
    model = plain_model("mlp", num_hidden_layers=32, cross_attention_layers=None)
    with torch.no_grad():
        assert len(model(**inputs(3), output_hidden_states=True).hidden_states) == 33


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_pooler_output_is_the_last_token_that_is_not_padding(models, padding):
    batch = inputs(7, 4, padding=padding)
    out = models["mlp"].model(**batch)
    last = [6, 6] if padding == "left" else [6, 3]
    assert torch.equal(out.pooler_output, out.last_hidden_state[[0, 1], last])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_attentions_under_eager(models, name):
    eager, batch = plain_model(name, attention="eager"), inputs(6, 6)
    out = eager(**batch, output_attentions=True)
    settings = eager.config
    assert len(out.attentions) == settings.num_hidden_layers and len(out.cross_attentions) == len(
        settings.cross_attention_layers
    )
    tokens = settings.num_query_tokens or 4 * 5  # patches of 14 x 19 pixels
    for weights in out.attentions:
        assert weights.shape == (2, settings.num_attention_heads, 6, 6)
        assert_close(weights.sum(-1), torch.ones(2, settings.num_attention_heads, 6))
        assert not weights.triu(1).any()
    for weights in out.cross_attentions:
        assert weights.shape == (2, settings.num_attention_heads, 6, tokens)
        assert_close(weights.sum(-1), torch.ones(2, settings.num_attention_heads, 6))
    assert_close(out.logits, logits(models[name], **batch))


@torch.no_grad()
def test_token_types(models):
    model, batch = models["mlp"], inputs(6)
    types = (batch["input_ids"] == IMAGE).long()
    assert types.sum() == 1
    assert torch.equal(logits(model, **batch, token_type_ids=types), logits(model, **batch))
    assert_differ(logits(model, **batch, token_type_ids=1 - types), logits(model, **batch))
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(logits(model, **batch, inputs_embeds=embeds, token_type_ids=types), logits(model, **inputs(6)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_padded_text_changes_nothing(models, name, padding):
    batch = inputs(8, 5, padding=padding)
    together = logits(models[name], **batch)
    place = slice(3, None) if padding == "left" else slice(5)
    alone = logits(models[name], input_ids=batch["input_ids"][1:, place], pixel_values=batch["pixel_values"][1:])
    assert_close(together[1:, place], alone)
    scrambled = batch["input_ids"].clone()
    scrambled[batch["attention_mask"] == 0] = 33
    assert torch.equal(logits(models[name], **{**batch, "input_ids": scrambled})[1, place], together[1, place])


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("filler", [float("nan"), 0.0, 1e4])
def test_padded_pixels_change_nothing(models, name, filler):
    one, two, three = images((16, 24), (10, 9), (4, 4))
    batch = inputs(5, 5, 5)
    batch |= pad_pixels(one, two, three, filler=filler)
    together = logits(models[name], **batch)
    for i, image in enumerate((one, two, three)):
        alone = logits(models[name], input_ids=batch["input_ids"][i : i + 1], pixel_values=image[None])
        assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("name", NAMES)
def test_position_in_the_batch_tensor_does_not_matter(models, name):
    """An image moved by whole patches within its padding gives the same result."""
    (image,) = images((8, 12))
    batch = inputs(5)
    alone = logits(models[name], **{**batch, "pixel_values": image[None]})
    pixels, mask = torch.full((1, 3, 24, 20), float("nan")), torch.zeros(1, 24, 20)
    pixels[0, :, 8:16, 4:16], mask[0, 8:16, 4:16] = image, 1
    assert_close(logits(models[name], **{**batch, "pixel_values": pixels, "pixel_attention_mask": mask}), alone)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 3), (4, 60), (40, 40)])
def test_any_resolution(models, name, size):
    batch = inputs(4, image=size)
    out = logits(models[name], **batch)
    assert out.isfinite().all()
    assert_close(logits(models[name], **batch, pixel_attention_mask=torch.ones(1, *size)), out)
    assert_differ(logits(models[name], **{**batch, "pixel_values": batch["pixel_values"].flip(2, 3) + 1}), out)


def test_rows_and_columns_are_told_apart(models):
    """An image and its transpose have the same patches (of one colour each) in other places."""
    colours = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    wide = colours.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[None]
    batch = inputs(4)
    for model in models.values():
        assert_differ(
            logits(model, **{**batch, "pixel_values": wide}),
            logits(model, **{**batch, "pixel_values": wide.transpose(2, 3)}),
        )


def test_positions_of_the_native_size_are_the_learned_ones():
    model = plain_model()
    table = model.model.visual.position_embed
    assert torch.equal(table(4, 4), table.positions)
    corners = [(0, 0), (0, -1), (-1, 0), (-1, -1)]
    other = table(7, 5)
    assert all(torch.allclose(other[corner], table.positions[corner]) for corner in corners)
    assert_close(table(7, 4)[::2], table.positions)


@pytest.mark.parametrize("name", NAMES)
def test_text_alone_beside_images(models, name):
    """A row without image in a batch with images equals the row alone without pixels."""
    (image,) = images((8, 8))
    batch = inputs(6, 6)
    batch |= pad_pixels(image, torch.zeros(3, 0, 0))
    together = logits(models[name], **batch)
    ids = batch["input_ids"]
    assert_close(together[1:], logits(models[name], input_ids=ids[1:]))
    assert_close(together[:1], logits(models[name], input_ids=ids[:1], pixel_values=image[None]))
    assert_differ(together[:1], logits(models[name], input_ids=ids[:1]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batch_of_absent_images_is_text_alone(attention):
    model, batch = plain_model(attention=attention), inputs(6, 4)
    pixels = batch.pop("pixel_values")
    absent = torch.zeros(2, *pixels.shape[2:])
    assert torch.equal(logits(model, **batch, pixel_values=pixels, pixel_attention_mask=absent), logits(model, **batch))


@pytest.mark.parametrize("name", NAMES)
def test_closed_gates_hide_the_image(name):
    model, batch = plain_model(name), inputs(6)
    open_gates = logits(model, **batch)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("gate"):
                parameter.zero_()
    closed = logits(model, **batch)
    batch.pop("pixel_values")
    assert_close(closed, logits(model, **batch))
    assert_differ(closed, open_gates)


@pytest.mark.parametrize("name", NAMES)
def test_several_images_per_sample(models, name):
    model, batch = models[name], inputs(6, 6)
    one, two, three = images((8, 8), (12, 5), (9, 16))
    first, second = (
        pad_pixels(one, two, torch.zeros(3, 12, 16)),
        pad_pixels(three, torch.zeros(3, 12, 0), torch.zeros(3, 0, 0)),
    )
    first["pixel_attention_mask"][2] = 0
    pixels = {key: torch.stack((first[key], second[key])) for key in first}
    together = logits(model, **{**batch, **pixels})
    ids = batch["input_ids"]
    both = {key: value[None] for key, value in pad_pixels(one, two).items()}
    assert_close(together[:1], logits(model, input_ids=ids[:1], **both))
    assert_close(together[1:], logits(model, input_ids=ids[1:], pixel_values=three[None]))
    swapped = {key: value.flip(1) for key, value in both.items()}
    assert_differ(logits(model, input_ids=ids[:1], **swapped), together[:1])
    assert_differ(logits(model, input_ids=ids[:1], pixel_values=one[None]), together[:1])


@pytest.mark.parametrize(
    "batch, message",
    [
        (
            dict(pixel_values=torch.zeros(1, 4, 8, 8)),
            r"pixel_values must be \[batch, 3, height, width\].*\(1, 4, 8, 8\)",
        ),
        (dict(pixel_values=torch.zeros(3, 8, 8)), "pixel_values must be"),
        (dict(pixel_values=torch.zeros(1, 3, 0, 8)), "pixel_values must be"),
        (dict(pixel_values=torch.zeros(1, 4, 3, 8, 8)), "4 images per sample, max_num_images is 3"),
        (
            dict(pixel_values=torch.zeros(1, 3, 8, 8), pixel_attention_mask=torch.ones(1, 8, 9)),
            r"pixel_attention_mask must be \[1, 8, 8\]",
        ),
        (dict(pixel_attention_mask=torch.ones(1, 8, 8)), "without pixel_values"),
        (dict(pixel_values=torch.zeros(2, 3, 8, 8)), "2 samples in pixel_values do not fit 1 rows"),
        (dict(inputs_embeds=torch.zeros(1, 4, 72)), "either input_ids or inputs_embeds"),
    ],
)
def test_misfit_inputs_are_refused(models, batch, message):
    with pytest.raises(ValueError, match=message):
        models["mlp"](input_ids=torch.tensor([[1, 2, 3, 4]]), **batch)


# --- training ---------------------------------------------------------------------------------------------------------


def test_loss_is_the_cross_entropy_of_the_next_token(models):
    batch = inputs(6, 4)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        out = models["mlp"](**batch, labels=labels)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(out.loss, expected, 1e-6)
    with torch.no_grad():
        summed = models["mlp"](**batch, labels=labels, num_items_in_batch=4).loss
    assert_close(summed, expected * (labels[:, 1:] != -100).sum() / 4, 1e-6)


def fresh(name, **changes):
    torch.manual_seed(0)
    return QVLForConditionalGeneration(config(name, **changes))


def trained(model, batch):
    model.zero_grad()
    torch.manual_seed(1)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_from_the_first_step(name):
    """As initialised: with gates at zero, vision and connector would have no gradient."""
    batch = inputs(6, 5, image=None) | pad_pixels(*images((8, 8), (11, 13)))
    batch["input_ids"][:, -2] = IMAGE
    without = [key for key, grad in trained(fresh(name).train(), batch).items() if grad is None or not grad.any()]
    assert not without


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    model, batch = fresh(name).train(), inputs(6, 5)
    expected = trained(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = trained(model, batch)
    assert (
        model.model.language_model.layers[0].gradient_checkpointing
        and model.model.visual.blocks[0].gradient_checkpointing
    )
    for key, grad in expected.items():
        assert torch.allclose(found[key], grad, rtol=1e-4, atol=1e-7), key


def test_dropout_only_in_training_and_where_configured(models):
    batch = inputs(6)
    model = fresh("mlp").train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    calm = fresh("mlp", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    assert torch.equal(calm(**batch).logits, calm(**batch).logits)
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        one = fresh("mlp", **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, key: 0.5}).train()
        assert not torch.equal(one(**batch).logits, one(**batch).logits), key


@pytest.mark.parametrize("name", NAMES)
def test_first_weights(name):
    model = fresh(name, initializer_range=0.05, hidden_size=96 if name == "mlp" else 80)
    for key, parameter in model.named_parameters():
        if key.endswith("gate"):
            assert parameter.item() == 0.5
        elif parameter.dim() >= 2:
            assert 0.6 * 0.05 < parameter.std() < 1.4 * 0.05, key
        else:
            assert torch.equal(
                parameter, torch.zeros_like(parameter) if key.endswith("bias") else torch.ones_like(parameter)
            ), key


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, models, name, dtype):
    model, batch = plain_model(name, dtype), inputs(6, 4)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert type(loaded) is QVLForConditionalGeneration and not any(
        info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    assert torch.equal(logits(loaded.eval(), **batch), logits(model, **batch))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (name == "mlp")
    body = AutoModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert type(body) is QVLModel
    with torch.no_grad():
        assert torch.equal(body(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_new_tokens():
    model = plain_model()
    model.resize_token_embeddings(VOCABULARY + 4)
    assert logits(model, **inputs(4)).shape[-1] == VOCABULARY + 4 == model.config.vocab_size
    assert model.lm_head.weight is model.get_input_embeddings().weight
