"""Modes and forward-mode AD see the PyTorch operations of the stock model."""

import copy

import pytest
import qvl_models
import torch
from models import assert_all_fused, assert_close, fused_calls, inputs, pair, relative
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

BATCH = inputs([5, (1, 4, 6), 3])
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class _Halved(TorchFunctionMode):
    """Halves the result of every linear layer."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 0.5 if function is torch.nn.functional.linear else out


class _HalvedBelow(TorchDispatchMode):
    """Halves the result of every matmul."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 0.5 if function in PRODUCTS else out


@pytest.mark.parametrize("mode", [_Halved, _HalvedBelow])
@pytest.mark.parametrize("family", ["Qwen3-VL", "QVL mlp", "QVL attention"])
def test_modes_that_change_results(family, mode):
    models, batch = (
        (pair("small"), BATCH) if family == "Qwen3-VL" else (qvl_models.pair(family.split()[1]), qvl_models.inputs(7))
    )
    with torch.no_grad():
        plain = models[0](**batch).logits
        with mode():
            expected, got = (model(**batch).logits for model in models)
        again = models[1](**batch).logits  # nothing of the mode is kept
    assert_close(got, expected)
    assert_close(again, plain)
    assert relative(expected, plain) > 0.1


@pytest.mark.parametrize("mode", [_Halved, _HalvedBelow])
def test_generate_under_a_mode(mode):
    outs = []
    for model in pair("small"):
        with mode():
            outs.append(
                model.generate(
                    **BATCH, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
                )
            )
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert_close(torch.stack(outs[1].logits), torch.stack(outs[0].logits))


@pytest.mark.parametrize("training", [False, True])
def test_flops_are_counted(training):
    counts = []
    for model in pair("small"):
        with torch.set_grad_enabled(training), FlopCounterMode(display=False) as flops:
            loss = model.train(training)(**BATCH, labels=BATCH["input_ids"]).loss
            if training:
                loss.backward()
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_default_device_is_no_such_mode():
    stock, ours = pair("small")
    with torch.no_grad(), torch.device("cpu"), fused_calls(ours) as calls:
        got = ours(**BATCH).logits
    assert_all_fused(calls, vision=True)
    with torch.no_grad():
        assert_close(got, stock(**BATCH).logits)


@pytest.mark.parametrize("where", ["text", "pixels", "a weight"])
def test_tangents_are_stocks(where):
    found = []
    for model in pair("small", attention="eager"):
        model.requires_grad_(False)
        with torch.no_grad(), forward_ad.dual_level():
            batch = copy.copy(BATCH)
            if where == "text":
                x = model.get_input_embeddings()(BATCH["input_ids"])
                batch = {"inputs_embeds": forward_ad.make_dual(x, x.flip(1))}
            elif where == "pixels":
                x = batch["pixel_values"]
                batch["pixel_values"] = forward_ad.make_dual(x, x.flip(1))
            else:
                layer = model.model.language_model.layers[1].mlp.up_proj
                x = layer.weight.detach()
                del layer.weight
                layer.weight = forward_ad.make_dual(x, x.flip(1))
            found.append(forward_ad.unpack_dual(model(**batch).logits))
    for got, expected in zip(found[1], found[0], strict=True):
        assert_close(got, expected)
    assert found[0].tangent.abs().max() > 0
