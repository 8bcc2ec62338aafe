"""Text inputs that QVL refuses, or takes with a warning."""

import copy

import pytest
import qvl_models
import torch
import transformers
from transformers import StaticCache

import qvl_model
from qvl_model.compat import CACHE


@pytest.fixture(params=["plain", "accelerated"])
def model(request):
    model = qvl_models.plain_model("attention")
    return qvl_model.accelerate(model) if request.param == "accelerated" else model


def _ids(model, rows=2, tokens=7):
    return torch.randint(10, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))


def _mask(*values):
    return torch.tensor(values)


REFUSED = {
    "values of 2": (
        dict(attention_mask=2 * torch.ones(2, 7, dtype=torch.long)),
        "must hold 1 for tokens and 0 for padding",
    ),
    "a mask to be added": (
        dict(attention_mask=torch.zeros(2, 7).index_fill(1, torch.tensor([0]), -1e4)),
        "four dimensions",
    ),
    "NaN": (dict(attention_mask=torch.full((2, 7), float("nan"))), "must hold 1 for tokens"),
    "half": (dict(attention_mask=torch.full((2, 7), 0.5)), "must hold 1 for tokens"),
    "too long": (
        dict(attention_mask=torch.ones(2, 9)),
        r"attention_mask must be \[2, 7\] for 2 rows of 7 tokens, got \[2, 9\]",
    ),
    "too short": (dict(attention_mask=torch.ones(2, 6)), r"must be \[2, 7\] .* got \[2, 6\]"),
    "one row": (dict(attention_mask=torch.ones(1, 7)), r"must be \[2, 7\] .* got \[1, 7\]"),
    "more rows": (dict(attention_mask=torch.ones(4, 7)), r"must be \[2, 7\] .* got \[4, 7\]"),
    "one dimension": (dict(attention_mask=torch.ones(7)), r"must be \[2, 7\] .* got \[7\]"),
    "three dimensions": (dict(attention_mask=torch.ones(2, 7, 7)), r"must be \[2, 7\] .* got \[2, 7, 7\]"),
    "four of other sizes": (dict(attention_mask=torch.zeros(2, 1, 6, 7)), r"\[2, 1, 7, keys\], got \[2, 1, 6, 7\]"),
    "four of other rows": (dict(attention_mask=torch.zeros(3, 1, 7, 7)), r"\[2, 1, 7, keys\], got \[3, 1, 7, 7\]"),
    "positions of three axes": (
        dict(position_ids=torch.arange(7).expand(3, 2, 7)),
        r"position_ids must be \[2, 7\].* got \[3, 2, 7\]",
    ),
    "too few positions": (dict(position_ids=torch.tensor([[3]])), r"position_ids must be \[2, 7\].* got \[1, 1\]"),
    "too few types": (
        dict(token_type_ids=torch.ones(2, 1, dtype=torch.long)),
        r"token_type_ids must be \[2, 7\].* got \[2, 1\]",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_wrong_inputs_are_refused(model, kind):
    arguments, message = REFUSED[kind]
    ids = _ids(model)
    for call in (model, model.model, model.model.language_model):
        with pytest.raises(ValueError, match=f"QVL: .*{message}"):
            call(input_ids=ids, **arguments)
    if "attention_mask" in arguments:  # generate drops a mask of ones, after it has computed positions from it
        for text in ({"inputs": ids}, {"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
            with pytest.raises(ValueError, match="QVL: attention_mask must"):
                model.generate(**text, **arguments, max_new_tokens=2)


@torch.no_grad()
def test_masks_count_what_is_in_the_cache(model):
    ids = _ids(model, 2, 9)
    mask = _mask([0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9)
    expected = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    for cache in (None, StaticCache(model.config, max_cache_len=16)):
        out = model(
            input_ids=ids[:, :8],
            attention_mask=mask[:, :8],
            use_cache=True,
            **({} if cache is None else {CACHE: cache}),
        )
        again = copy.deepcopy(out.past_key_values)
        for wrong in (mask[:, :8], mask[:, 8:], torch.ones(2, 10), mask[:1]):
            with pytest.raises(
                ValueError, match=r"must be \[2, 9\] for 2 rows of 8 tokens in the cache and 1 new ones"
            ):
                model(input_ids=ids[:, 8:], attention_mask=wrong, **{CACHE: again})
        with pytest.raises(ValueError, match="must hold 1 for tokens"):
            model(input_ids=ids[:, 8:], attention_mask=3 * mask, **{CACHE: again})
        got = model(input_ids=ids[:, 8:], attention_mask=mask, **{CACHE: out.past_key_values}).logits[:, -1]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_masks_of_every_kind_say_the_same(model):
    """bool, float and int masks, and the same mask in four dimensions; None and ones."""
    ids = _ids(model)
    mask = _mask([0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1])
    expected = model(input_ids=ids, attention_mask=mask).logits[:, 3:]
    for kind in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
        assert torch.equal(model(input_ids=ids, attention_mask=mask.to(kind)).logits[:, 3:], expected)
    seen = mask.bool()[:, None, None] & torch.ones(7, 7, dtype=torch.bool).tril()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=seen, position_ids=positions).logits[:, 3:], expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        model(input_ids=ids).logits, model(input_ids=ids, attention_mask=torch.ones(2, 7)).logits, rtol=1e-4, atol=1e-5
    )


def test_every_way_to_generate_passes(model):
    ids, mask = _ids(model), _mask([0, 0, 1, 1, 1, 1, 1], [1] * 7)
    pixels = torch.rand(
        2,
        3,
        2 * model.config.vision_patch_size,
        2 * model.config.vision_patch_size,
        generator=torch.Generator().manual_seed(1),
    )
    for options in (
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
    ):
        out = model.generate(
            ids,
            attention_mask=mask,
            pixel_values=pixels,
            max_new_tokens=4,
            eos_token_id=None,
            disable_compile=True,
            **options,
        )
        assert out.shape[1] == 11
    cache = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    assert model.generate(ids, attention_mask=mask, max_new_tokens=2, eos_token_id=None, **{CACHE: cache}).shape[1] == 9
    with pytest.raises(ValueError, match=r"must be \[2, 7 \+ what the cache holds\], as the prompt, got \[2, 8\]"):
        model.generate(ids, attention_mask=torch.ones(2, 8), max_new_tokens=2, **{CACHE: cache})


def test_text_longer_than_meant_is_warned_of_once(model, caplog):
    """Stock Qwen3-VL computes positions beyond max_position_embeddings too, and generate warns: the formula
    has no end.
    """
    ids = _ids(model, 1, 12)
    expected = model(input_ids=ids).logits
    model.config.max_position_embeddings = 11
    transformers.utils.logging.enable_propagation()
    try:
        got = [model(input_ids=ids).logits for _ in range(2)]
        out = model(input_ids=ids[:, :11], use_cache=True)
    finally:
        transformers.utils.logging.disable_propagation()
    warned = [record for record in caplog.records if "longer than max_position_embeddings (11)" in record.message]
    assert (
        len(warned) <= 1
        and all(torch.equal(logits, expected) for logits in got)
        and out.past_key_values.get_seq_length() == 11
    )


def test_the_warning_is_there(monkeypatch):
    from qvl_model.qvl import inputs

    said = []
    monkeypatch.setattr(inputs.logger, "warning_once", said.append)
    model = qvl_models.plain_model("mlp", max_position_embeddings=8)
    cache = model(input_ids=_ids(model, 1, 8), use_cache=True).past_key_values
    assert said == []
    model(input_ids=_ids(model, 1, 1), **{CACHE: cache})
    assert len(said) == 1 and "longer than max_position_embeddings (8)" in said[0]


def test_a_decoding_step_elsewhere_reads_no_mask():
    """Mask values are read on the CPU only: on a GPU that would synchronise at each token. The meta device takes a
    GPU's place.
    """
    from qvl_model.qvl.inputs import _check_mask

    class Counted(torch.Tensor):
        is_cpu = False
        reads = 0

        def __eq__(self, other):
            Counted.reads += 1
            return torch.Tensor.__eq__(self.as_subclass(torch.Tensor), other)

        __hash__ = torch.Tensor.__hash__

    mask = torch.ones(2, 9, dtype=torch.long).as_subclass(Counted)
    _check_mask(mask, 2, 1, 8)
    assert Counted.reads == 0
    _check_mask(mask, 2, 9, 0)
    assert Counted.reads > 0
    with pytest.raises(ValueError, match="must be"):
        _check_mask(mask, 2, 1, 9)
    _check_mask(torch.full((2, 9), 3, device="meta"), 2, 9, 0)


KEYWORDS = {
    "pixel_valuess": "did you mean pixel_values?",
    "pixel_mask": "pixel_attention_mask|pixel_values",
    "token_types": "did you mean token_type_ids?",
    "label": "did you mean labels?",
    "image_grid_thw": "known are attention_mask, ",
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_that_nobody_reads(model, name):
    for part in (model, model.model, model.model.language_model):
        with pytest.raises(TypeError, match=f"QVL: {name} is no argument of the model; .*({KEYWORDS[name]})"):
            part(input_ids=_ids(model), **{name: torch.ones(2, 3, 8, 8)})


def test_keywords_that_transformers_passes(model):
    with torch.no_grad():
        plain = model(input_ids=_ids(model)).logits
        out = model(
            input_ids=_ids(model),
            return_dict=True,
            output_attentions=False,
            output_hidden_states=False,
            use_cache=True,
            cache_position=torch.arange(7),
            num_items_in_batch=3,
            labels=_ids(model),
            logits_to_keep=0,
            skip_logits=False,
            **{CACHE: None},
        )
    assert torch.equal(out.logits, plain)


PIXELS = {
    "a list": (dict(pixel_values=[1]), TypeError, "pixel_values must be a torch.Tensor, got list"),
    "a mask that is a list": (
        dict(pixel_values=torch.ones(2, 3, 8, 8), pixel_attention_mask=[[1]]),
        TypeError,
        "pixel_attention_mask must be a torch.Tensor",
    ),
    "values of 2": (
        dict(pixel_values=torch.ones(2, 3, 8, 8), pixel_attention_mask=torch.full((2, 8, 8), 2)),
        ValueError,
        "must hold 1 for pixels",
    ),
    "a mask to be added": (
        dict(pixel_values=torch.ones(2, 3, 8, 8), pixel_attention_mask=torch.full((2, 8, 8), -1e4)),
        ValueError,
        "must hold 1 for pixels",
    ),
}


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "token_type_ids"])
def test_lists_for_tensors_are_refused(model, name):
    ids = _ids(model)
    for value in (ids.tolist(), ids.numpy()):
        with pytest.raises(TypeError, match=f"QVL: {name} must be a torch.Tensor, got {type(value).__name__}"):
            model(input_ids=ids, **{name: value})


@pytest.mark.parametrize("kind", PIXELS)
def test_wrong_pixels_are_refused(model, kind):
    arguments, error, message = PIXELS[kind]
    for call in (model, model.model):
        with pytest.raises(error, match=f"QVL: .*{message}"):
            call(input_ids=_ids(model), **arguments)
    with pytest.raises(error, match=f"QVL: .*{message}"):
        model.get_image_features(**arguments)
