"""The extension's Watch: whether dictionaries, types and tensors are what they were when it was made."""

import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

from qvl_kernels import dispatch
from qvl_model.modules import decoder_layer


class _Other(nn.Linear):
    pass


@pytest.fixture
def module():
    return nn.Linear(3, 2)


def _watch(module: nn.Linear):
    return dispatch.extension().Watch(
        entries=[(module._parameters, "weight", module.weight), (module._parameters, "bias", module.bias)],
        absent=[(vars(module), "forward")], empty=[(vars(module), "_forward_hooks")], types=[module], tensors=[module.weight],
    )  # fmt: skip


def _holds(*watches) -> bool:
    return dispatch.extension().Watch.all_hold(watches)


CHANGES = {
    "entry": lambda module: setattr(module, "weight", nn.Parameter(module.weight.detach())),
    "entry gone": lambda module: module._parameters.pop("bias"),
    "absent": lambda module: setattr(module, "forward", lambda x: x),
    "empty": lambda module: module.register_forward_hook(lambda *_: None),
    "another dictionary in its place": lambda module: vars(module).__setitem__("_forward_hooks", OrderedDict(a=1)),
    "no dictionary in its place": lambda module: vars(module).__setitem__("_forward_hooks", None),
    "type": lambda module: setattr(module, "__class__", _Other),
    "memory": lambda module: setattr(module.weight, "data", module.weight.data.clone()),
    "elements": lambda module: setattr(module.weight, "data", module.weight.data[:1]),
    "place in the same memory": lambda module: setattr(module.weight, "data", module.weight.data[1:]),
    "swapped for another tensor": lambda module: torch.utils.swap_tensors(module.weight, nn.Parameter(torch.zeros(2, 3))),
    "resized": lambda module: module.weight.data.untyped_storage().resize_(1 << 20),
}


@pytest.mark.parametrize("change", CHANGES)
def test_notices(module, change):
    watch, other = _watch(module), _watch(nn.Linear(3, 2))
    assert _holds() and _holds(watch) and _holds(watch, other, watch)
    CHANGES[change](module)
    assert not _holds(watch) and not _holds(other, watch) and _holds(other)


def test_notices_another_dtype_in_the_same_memory():
    x = torch.zeros(4)
    watch = dispatch.extension().Watch(entries=[], absent=[], empty=[], types=[], tensors=[x])
    assert _holds(watch)
    x.data = x.data.view(torch.int32)
    assert _holds(watch) != decoder_layer.watch_sees_dtypes()


def test_values_may_change(module):
    watch = _watch(module)
    with torch.no_grad():
        module.weight.mul_(2.0)
    vars(module)["a"] = 1  # dictionaries may grow and move
    for i in range(100):
        vars(module)[f"a{i}"] = i
    assert _holds(watch)


def test_a_tensor_that_changed_and_changed_back_holds(module):
    watch, weight, data = _watch(module), module.weight, module.weight.data
    weight.data = data.clone()
    assert not _holds(watch) and not _holds(watch)
    weight.data = data
    assert _holds(watch) and _holds(watch)


def test_attributes_of_a_tensor_may_change(module):
    watch, weight = _watch(module), module.weight
    weight.requires_grad_(False).marked = True
    others = [weight.detach(), weight.view(-1)]  # share its storage
    assert _holds(watch) and _holds(watch)
    del others
    assert _holds(watch)


def test_keeps_what_it_watches_alive():
    module = nn.Linear(3, 2)
    watch = _watch(module)
    del module
    assert _holds(watch)


def test_a_dictionary_that_changed_and_changed_back_holds(module):
    """A number that changes with every change of a dictionary only says that it has to be looked into again."""
    watch, weight = _watch(module), module.weight
    assert _holds(watch)
    module._parameters["weight"] = weight.detach()
    assert not _holds(watch) and not _holds(watch)
    module._parameters["weight"] = weight
    assert _holds(watch) and _holds(watch)
    handle = module.register_forward_hook(lambda *_: None)
    assert not _holds(watch)
    handle.remove()
    assert _holds(watch)


def test_a_footprint_of_what_is_gone_can_be_fetched():
    objects = [object(), {"a": 1}, torch.zeros(3), nn.Linear(3, 2), vars(nn.Linear(3, 2)), None, []]
    footprint, kept = dispatch.extension().Footprint(objects), dispatch.extension().Footprint([])
    reference = weakref.ref(objects[3])
    del objects
    gc.collect()
    assert reference() is None
    footprint.fetch()
    kept.fetch()
