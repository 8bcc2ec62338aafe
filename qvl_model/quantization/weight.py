"""The weight of a quantised module as a tensor for other libraries, and how adapters are merged into it."""

import inspect
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qvl_kernels.quantization import QuantizedWeight

__all__ = ["TAKEN_OUT", "Kept", "Merge", "DequantizedWeight", "copied_to_train", "merge_in_progress"]


TAKEN_OUT = (
    "the weight of a quantised layer cannot be taken out of it, as parametrizations and adapters with "
    "target_parameters do; train an adapter of its "
    "layer (target_modules), or quantise (accelerate) without this part"
)


class DequantizedWeight(Tensor):
    """The weight [N, K] of a quantised module, or a view of it. Operations read dequantised values; what they write is
    quantised again and stored in the module. The tensor itself has no memory, so its shape, dtype and device cost
    nothing to read.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls: type, module: nn.Module, views: tuple[Callable[[Tensor], Tensor], ...] = ()
    ) -> "DequantizedWeight":
        if "weight" not in module._parameters:
            raise TypeError(TAKEN_OUT)
        shape = (module.weight_values.shape[0], module.quantized.in_features)
        like = _through(views, torch.empty(shape, dtype=module._parameters["weight"].dtype, device="meta"))
        return Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=module.weight_values.device,
        )

    def __init__(self, module: nn.Module, views: tuple[Callable[[Tensor], Tensor], ...] = ()) -> None:
        self.module, self.views = module, views

    @property
    def data(self) -> "DequantizedWeight":
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is self:  # as in weight.data += delta
            return
        if self.views:
            raise RuntimeError(
                "a view of a quantised weight takes no new data; write to it in place, or give the weight itself "
                "new data"
            )
        self.module.requantize(value)

    def requires_grad_(self, requires_grad: bool = True) -> "DequantizedWeight":
        if requires_grad:
            raise RuntimeError(
                "a quantised weight is a constant; train an adapter on top of it, or quantise (accelerate) without "
                "this part"
            )
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].module, args[0].views)
        if func.is_view and isinstance(args[0], cls):
            return _views(func, args, kwargs)
        written = [weight for weight in _written(func, args, kwargs) if isinstance(weight, cls)]
        # In-place operations run in fp32, so that merging an adapter rounds once, when the sum is quantised.
        dtypes = {weight.dtype for weight in written}
        bases: dict[nn.Module, Tensor] = {}

        def dequantised(value: Any) -> Any:
            if isinstance(value, cls):
                if value.module not in bases:
                    bases[value.module] = value.module.dequantize(torch.float32 if written else value.dtype)
                return _through(value.views, bases[value.module])
            return value.float() if isinstance(value, Tensor) and value.dtype in dtypes else value

        out = func(*tree_map(dequantised, args), **tree_map(dequantised, kwargs))
        for module in {weight.module for weight in written}:
            module.requantize(bases[module])
        return written[0] if len(written) == 1 and isinstance(out, Tensor) else out


def _through(views: tuple[Callable[[Tensor], Tensor], ...], weight: Tensor) -> Tensor:
    for view in views:
        weight = view(weight)
    return weight


def _views(func: Any, args: tuple, kwargs: dict) -> "DequantizedWeight | list[DequantizedWeight]":
    """The view, or views, that ``func`` makes of its first argument."""
    weight, *others = args

    def at(index: int | None) -> DequantizedWeight:
        def view(base: Tensor) -> Tensor:
            out = func(base, *others, **kwargs)
            return out if index is None else out[index]

        return DequantizedWeight(weight.module, (*weight.views, view))

    out = func(torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta"), *others, **kwargs)
    return at(None) if isinstance(out, Tensor) else [at(index) for index in range(len(out))]


def _written(func: Any, args: tuple, kwargs: dict) -> list:
    """The arguments that an operator changes in place."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tree_leaves(args[index] if index < len(args) else kwargs.get(argument.name))
    return found


class Merge(NamedTuple):
    """A merge of an adapter into a module.

    Attributes:
        kind: class of the module; an embedding and a linear layer may share a weight and have an adapter each.
        before: the other adapters that are merged into this module's weight.
        undone: whether this is an unmerge.
        for_good: whether the merge cannot be undone (merge_and_unload).
    """

    kind: str
    before: tuple[str, ...]
    undone: bool
    for_good: bool


class Kept:
    """The quantised weight as it was before the first of the currently merged adapters."""

    def __init__(self) -> None:
        self.original: QuantizedWeight | None = None
        self.merges: set[tuple[str, tuple[str, ...]]] = set()  # (kind, before) of each

    def keep(self, merge: Merge, weight: QuantizedWeight) -> None:
        if not merge.before:  # the recorded merges were unloaded then
            self._drop(merge)
        if not self.merges:
            self.original = weight.apply(torch.clone)
        self.merges.add((merge.kind, merge.before))

    def undo(self, merge: Merge) -> QuantizedWeight | None:
        """The original, if this was the last adapter. Raises: RuntimeError if it is not known."""
        if self.original is None:
            raise RuntimeError(
                "unmerge: the weight that this quantised layer had before the merge was not kept; load the model again"
            )
        original = self.original
        self._drop(merge)
        return original if self.original is None else None

    def _drop(self, merge: Merge) -> None:
        self.merges = {
            (kind, before) for kind, before in self.merges if kind != merge.kind or len(before) < len(merge.before)
        }
        if not self.merges:
            self.forget()

    def forget(self) -> None:
        self.original, self.merges = None, set()


def merge_in_progress(module: nn.Module) -> Merge | None:
    """The merge that is writing the weight of ``module``, or None.

    PEFT's ``merge`` and ``unmerge`` write weights without calling the module, so that only the call stack shows that
    one of them is running. The names are those of PEFT's public methods.
    """
    for frame in _calls():
        if frame.f_code.co_name in ("merge", "unmerge"):
            adapter = frame.f_locals.get("self")
            inner = (
                adapter.get_base_layer()
                if hasattr(adapter, "merged_adapters") and hasattr(adapter, "get_base_layer")
                else None
            )
            if getattr(inner, "weight_values", None) is module.weight_values:
                for_good = any(caller.f_code.co_name == "merge_and_unload" for caller in _calls())
                return Merge(
                    type(inner).__name__, tuple(adapter.merged_adapters), frame.f_code.co_name == "unmerge", for_good
                )
    return None


def copied_to_train(module: nn.Module) -> bool:
    """Whether ``module``, or a module around it, is being copied for PEFT's ``modules_to_save``."""
    for frame in _calls():
        wrapper = frame.f_locals.get("self") if frame.f_code.co_name == "update" else None
        if hasattr(wrapper, "modules_to_save") and hasattr(wrapper, "original_module"):
            return any(part is module for part in wrapper.original_module.modules())
    return False


def _calls() -> Iterator[FrameType]:
    """The frames of the call stack, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
