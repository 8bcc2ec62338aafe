"""Logits of a training step that are computed when they are first read, and a loss that does not need them.

Lazy logits are one node of autograd's graph, to which the loss, hooks, retained gradients and readers are attached as
to any other. What is saved is the memory of their values (LazyLogits) and of their gradient between the loss and the
head (_LazyGradient).
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves, tree_map_only

import qvl_kernels

__all__ = ["LazyLogits", "lazy_logits", "lazy_loss"]

_GONE = (
    "the logits of this training step were not computed, and can no longer be: there was a backward, another "
    "forward of the model, or hidden "
    "states or weights were changed. Read them before, or keep them by model(..., skip_logits=False) or "
    "accelerate(model, skip_logits=False)"
)
_CHANGED = (
    "hidden states, labels or the weight of the head were changed between the loss and its backward, which computes "
    "the logits again. Change them after it, or keep the logits by model(..., skip_logits=False) or accelerate(model, "
    "skip_logits=False)"
)
_CHUNK_BYTES = {"cpu": 1 << 22}  # of a fingerprint: fits a CPU cache
_CHUNK_BYTES_GPU = 1 << 28  # few launches


def lazy_logits(hidden: Tensor, weight: Tensor, own: tuple[bool, bool], forward: Any) -> "LazyLogits":
    """hidden [..., C] @ weight [V, C].T, computed at its first use, unless that asks for shape, dtype or device only.

    Args:
        hidden, weight: plain tensors, one of which requires gradients.
        own: whether each of them is a private copy, which no other code can change.
        forward: an object whose ``count`` changes with the model's next forward.
    """
    return _Head.apply(hidden, weight, own, forward)


def lazy_loss(logits: "LazyLogits", labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """cross_entropy of lazy logits, without computing them; labels int64, one per token.

    Raises: RuntimeError if what the logits would be computed from has changed; ValueError for bad labels.
    """
    logits.source.check()
    loss = _SkippedLoss(logits.source, labels, ignore_index, reduction)
    return _Loss.apply(logits, loss) if torch.is_grad_enabled() else loss.compute()


class _Watched:
    """Tells whether tensors have changed since this was made, also by writes that bypass autograd's version counter
    (``.data``, fused optimizer steps).
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors
        self.versions = [x._version for x in tensors]
        self.states, self.fingerprints = [_state(x) for x in tensors], [_fingerprint(x) for x in tensors]

    def unchanged(self) -> bool:
        return [x._version for x in self.tensors] == self.versions and self.same_values()

    def same_values(self) -> bool:
        """Whatever the version counters say: sharding libraries write the same values again."""
        return [_state(x) for x in self.tensors] == self.states and all(
            torch.equal(now, before)
            for x, print_ in zip(self.tensors, self.fingerprints)
            for now, before in zip(_fingerprint(x), print_)
        )


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _state(x: Tensor) -> tuple:
    """Includes the size of the storage, since sharding libraries free it in place."""
    return x.device, x.dtype, x.shape, x.stride(), x.untyped_storage().nbytes()


def _fingerprint(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the bits of x [..., C], as integers, over rows and over columns. The sums are exact (modulo 2^64), so any
    change of one element shows, and so does a permutation. 54 ms for a head of 622 MB on two cores of an EPYC, against
    seconds for a training step. Taken in the forward, and again when logits, a loss or its gradients are computed,
    which waits for the GPU.
    """
    x = x.detach()
    sizes = [n * x.element_size() for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1])] + [x.data_ptr()]
    word = next(d for d in (torch.int64, torch.int32, torch.int16) if all(size % d.itemsize == 0 for size in sizes))
    words = x.view(word) if x.dim() > 1 else x.view(word)[None]
    row_bytes = max(1, words[:1].numel() * word.itemsize)
    rows, columns = [], 0
    for chunk in words.split(max(1, _CHUNK_BYTES.get(x.device.type, _CHUNK_BYTES_GPU) // row_bytes)):
        rows.append(chunk.sum(-1))
        columns = columns + chunk.sum(tuple(range(chunk.dim() - 1)))
    return torch.cat(rows), columns


class _Source:
    """Inputs of lazy logits, until they may have changed. One per call of the head, without autograd nodes."""

    def __init__(self, hidden: Tensor, weight: Tensor, own: tuple[bool, bool], forward: Any) -> None:
        self.hidden, self.weight, self.device = hidden.detach(), weight.detach(), hidden.device
        self.needs_grad = hidden.requires_grad, weight.requires_grad
        self.watched = _Watched(*(x for x, is_own in ((self.hidden, own[0]), (weight, own[1])) if not is_own))
        self.forward, self.count = forward, forward.count
        self.cells: list[weakref.ref[_Cell]] = []

    def check(self) -> None:
        if self.hidden is None or self.forward.count != self.count or not self.watched.unchanged():
            self.close()
            raise RuntimeError(_GONE)

    def close(self) -> None:
        self.hidden = self.weight = self.watched = None

    def compute(self) -> None:
        """Fills all cells, those with casts of these logits too, since the logits may be edited later."""
        self.check()
        logits = _matmul(self.hidden, self.weight)
        for cell in filter(None, (ref() for ref in self.cells)):
            cell.data = logits.to(cell.dtype)
        self.close()


def _matmul(hidden: Tensor, weight: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return qvl_kernels.linear(hidden, weight)


class _Cell:
    """The memory of logits, shared by their aliases; ``data`` is None until it is computed."""

    def __init__(self, source: _Source, shape: torch.Size, dtype: torch.dtype) -> None:
        self.source, self.shape, self.dtype, self.device, self.data = source, shape, dtype, source.device, None
        source.cells.append(weakref.ref(self))

    def alias(self) -> Tensor:
        """The logits, computed if need be, as a new tensor over the same memory."""
        if self.data is None:
            self.source.compute()
        with torch.inference_mode(False), torch.no_grad():
            return self.data.new_empty(0).set_(self.data)


class _Wrapper(Tensor):
    """A tensor without values. Functions of PyTorch get ``value()`` instead, but for those that ask for metadata."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return _natively(func, args, kwargs)
        return func(*_values(args), **_values(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        """For calls that bypass ``__torch_function__``: from C++ (autograd adds up gradients), or inside an autograd
        function, whose graph exists already.
        """
        if func in _ALIASES and args[0].shape == (tuple(args[1]) if len(args) > 1 else args[0].shape):
            return args[0].shallow_copy()
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would write to a tensor that is not computed yet; pass outputs.logits.value()")
        return func(*_values(args, detached=True), **_values(kwargs or {}, detached=True))


class LazyLogits(_Wrapper):
    """Logits that are not computed yet. Values and gradients are exact. After the backward, the next forward of the
    model, or a change of hidden states or weights, reading logits for the first time raises RuntimeError.
    """

    @staticmethod
    def __new__(cls: type, cell: _Cell) -> "LazyLogits":
        return Tensor._make_wrapper_subclass(cls, cell.shape, dtype=cell.dtype, device=cell.device)

    def __init__(self, cell: _Cell) -> None:
        self.cell, self._value = cell, None
        self._read = self._own = self._followed = (
            None  # nodes: of the value when it was read, of this tensor then, of the edited value it stands for
        )

    @property
    def source(self) -> _Source:
        return self.cell.source

    @property
    def computed(self) -> bool:
        return self.cell.data is not None

    def shallow_copy(self) -> "LazyLogits":
        return LazyLogits(self.cell)

    def detached_value(self) -> Tensor:
        return self.cell.alias()

    def value(self) -> Tensor:
        """The logits themselves: one tensor in the graph, so that in-place edits take effect, whatever the grad mode of
        its first reader. After an autograd function wrote to this tensor in place, it is a new one behind that
        function's node.
        """
        if not self._is_read():
            with torch.inference_mode(False), torch.enable_grad():
                self._value = _Read.apply(self, self.cell.alias)
            self._read, self._own = self._value.grad_fn, _native_node(self)
            if _natively(Tensor.retains_grad.__get__, (self,), {}):
                self._value.retain_grad()  # for after an edit, which takes it over
        return self._value

    def node(self) -> Tensor:
        """The tensor that stands for the logits in the graph: this one, until its value is edited with gradients; then
        the value.
        """
        return self._value if self._is_read() and self._value.grad_fn is not self._read else self

    def _is_read(self) -> bool:
        return self._value is not None and self._own is _native_node(self)

    def _follow(self) -> None:
        """After an edit of its value: moves this tensor behind the edit in the graph, for autograd functions that take
        this tensor.
        """
        if self._is_read() and self._value.grad_fn not in (self._read, self._followed):
            with torch.inference_mode(False), torch.enable_grad():
                _Follow.apply(self, self._value)
            self._own, self._followed = _native_node(self), self._value.grad_fn

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_GRAPH:
            return _in_graph(func, *tree_map_only(LazyLogits, lambda x: x.node(), (args, kwargs)))
        if args and isinstance(args[0], LazyLogits) and not args[0].computed and _widens(func, args, kwargs):
            return args[0] if args[0].cell.dtype == torch.float32 else _Widen.apply(args[0])
        if func in _METADATA:
            return _natively(func, args, kwargs)
        read = [(x, x.value(), x.value()._version) for x in tree_leaves((args, kwargs)) if isinstance(x, LazyLogits)]
        out = func(*_values(args), **_values(kwargs))
        for logits, value, version in read:
            logits._follow()
            if out is value and value._version != version:  # an in-place edit returns its input
                out = logits
        return out


class _LazyGradient(_Wrapper):
    """The gradient of a skipped loss with respect to its logits; the head's backward does not need its values."""

    @staticmethod
    def __new__(cls: type, loss: "_SkippedLoss", factor: Tensor, cell: _Cell, dtype: torch.dtype) -> "_LazyGradient":
        return Tensor._make_wrapper_subclass(cls, cell.shape, dtype=dtype, device=cell.device)

    def __init__(self, loss: "_SkippedLoss", factor: Tensor, cell: _Cell, dtype: torch.dtype) -> None:
        self.loss, self.factor, self.cell, self._dtype, self._value = loss, factor, cell, dtype, None

    @property
    def computed(self) -> bool:
        return self._value is not None

    def cast(self, dtype: torch.dtype) -> "_LazyGradient":
        return _LazyGradient(self.loss, self.factor, self.cell, dtype)

    def shallow_copy(self) -> "_LazyGradient":
        copy = self.cast(self._dtype)
        copy._value = self._value
        return copy

    def value(self) -> Tensor:
        if self._value is None:
            self._value = self.loss.gradient_of_logits(self.factor).view(self.cell.shape).to(self._dtype)
        return self._value

    detached_value = value


def _natively(func: Callable, args: tuple, kwargs: dict) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _native_node(x: Tensor) -> Node | None:
    """The grad_fn of a wrapper itself, not of its value."""
    return _natively(Tensor.grad_fn.__get__, (x,), {})


def _values(tree: Any, detached: bool = False) -> Any:
    return tree_map_only(_Wrapper, lambda x: x.detached_value() if detached else x.value(), tree)


def _gradients(tree: Any) -> Any:
    return tree_map_only(_LazyGradient, lambda x: x.value(), tree)


def _in_graph(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Runs a function that reads the graph or gradients; gradients that it gets are computed."""
    asked = [x for x in tree_leaves((args, kwargs)) if isinstance(x, LazyLogits)]
    if func is Tensor.register_hook and asked and not _ignores_gradient(args[1]):
        args = args[0], lambda gradient, hook=args[1]: hook(_gradients(gradient))
    if func not in _MAKES_GRADIENTS:
        return _gradients(_natively(func, args, kwargs))
    handles = [
        _natively(Tensor.register_hook, (x, _gradients), {}) for x in asked
    ]  # so that gradients that are returned or retained have values
    if func is Tensor.retain_grad:
        for value in [x.value() for x in asked if x.computed]:
            value.retain_grad()
        return _natively(func, args, kwargs)
    try:
        return _natively(func, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _widens(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether ``func`` is a cast to fp32, which mixed-precision wrappers and the loss apply; it stays lazy."""
    return not kwargs and (
        func is Tensor.float and len(args) == 1 or func is Tensor.to and args[1:] == (torch.float32,)
    )


def _ignores_gradient(hook: Callable) -> bool:
    """Whether a hook does not read the gradient, as FSDP's hooks do not."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")


class _Head(Function):
    """hidden, weight -> LazyLogits"""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, own: tuple[bool, bool], forward: Any) -> LazyLogits:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight)
        ctx.source = _Source(hidden, weight, own, forward)
        return LazyLogits(_Cell(ctx.source, torch.Size((*hidden.shape[:-1], weight.shape[0])), hidden.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        hidden, weight = ctx.saved_tensors
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if not keep:
            ctx.source.close()
        if isinstance(grad, _LazyGradient) and not grad.computed:
            return *grad.loss.gradients(grad.factor, hidden.shape, keep), None, None
        grad = _gradients(grad)
        dhidden = grad @ weight if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = grad.reshape(-1, grad.shape[-1]).t() @ hidden.reshape(-1, hidden.shape[-1])
        return dhidden, dweight, None, None


class _Read(Function):
    """Lazy logits -> ``values()``, with the lazy logits as its input in the graph"""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, values: Callable[[], Tensor]) -> Tensor:
        return values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Follow(Function):
    """Lazy logits, their edited value -> the lazy logits, behind the edited value in the graph"""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, value: Tensor) -> LazyLogits:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class _Widen(Function):
    """Lazy logits -> the same in fp32"""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits) -> LazyLogits:
        ctx.set_materialize_grads(False)
        ctx.dtype = logits.cell.dtype
        return LazyLogits(_Cell(logits.source, logits.cell.shape, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        if isinstance(grad, _LazyGradient) and not grad.computed:
            return grad.cast(ctx.dtype)
        return None if grad is None else _gradients(grad).to(ctx.dtype)


class _SkippedLoss:
    """cross_entropy(hidden @ weight.T, labels) and its gradients, in a graph of its own."""

    def __init__(self, source: _Source, labels: Tensor, ignore_index: int, reduction: str) -> None:
        self.hidden, self.weight = source.hidden.reshape(-1, source.hidden.shape[-1]).detach(), source.weight.detach()
        self.needs_grad, self.watched = source.needs_grad, source.watched
        self.labels, self.ignore_index, self.reduction, self.value = labels, ignore_index, reduction, None
        self.labels_version = _version(labels)

    def compute(self) -> Tensor:
        with torch.autocast(self.hidden.device.type, enabled=False):
            return qvl_kernels.linear_cross_entropy(
                self.hidden, self.weight, self.labels, ignore_index=self.ignore_index, reduction=self.reduction
            )

    def record(self) -> Tensor:
        """The loss, computed with a graph of its own. Saved-tensor hooks (offloading, checkpointing) are switched off,
        since the head's own saved tensors pass through them already.
        """
        for x, needed in zip((self.hidden, self.weight), self.needs_grad):
            x.requires_grad_(needed)
        with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            self.value = self.compute()
        return self.value.detach()

    def gradients(self, factor: Tensor, shape: torch.Size, keep: bool) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of hidden [*shape] and weight; None where not needed.

        Raises: RuntimeError if what they are computed from has changed since the loss.
        """
        if _version(self.labels) != self.labels_version or not self.watched.same_values():
            raise RuntimeError(_CHANGED)
        wanted = [x for x in (self.hidden, self.weight) if x.requires_grad]
        found = iter(torch.autograd.grad(self.value, wanted, factor, retain_graph=keep))
        dhidden, dweight = (next(found) if x.requires_grad else None for x in (self.hidden, self.weight))
        if not keep:
            self.hidden = self.weight = self.watched = self.value = None
        return None if dhidden is None else dhidden.view(shape), dweight

    def logits(self) -> Tensor:
        """The logits, computed now from the inputs of the loss; edits of logits that were read have no effect."""
        if self.hidden is None or not self.watched.unchanged():
            raise RuntimeError(_GONE)
        return _matmul(self.hidden, self.weight)

    def of(self, logits: Tensor) -> Tensor:
        """The loss of given logits, by PyTorch."""
        return cross_entropy(
            logits.float().view(-1, logits.shape[-1]),
            self.labels,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def gradient_of_logits(self, factor: Tensor) -> Tensor:
        """factor * (softmax(logits) - one_hot(labels)); written out, since autograd may be off where it is needed."""
        with torch.no_grad():
            counted = (self.labels != self.ignore_index)[:, None]
            if self.reduction == "mean":
                factor = factor / counted.sum()
            gradient = self.logits().float().softmax(-1)
            gradient.scatter_add_(
                1, self.labels[:, None].masked_fill(~counted, 0), torch.full_like(gradient[:, :1], -1.0)
            )
            return gradient.mul_(factor.float()).masked_fill_(~counted, 0.0)


class _Loss(Function):
    """Lazy logits -> the loss"""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, loss: "_SkippedLoss") -> Tensor:
        ctx.logits, ctx.loss = logits, loss
        return loss.record()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, loss = ctx.logits, ctx.loss
        if not torch.is_grad_enabled():
            return _LazyGradient(loss, grad, logits.cell, logits.cell.dtype), None
        # create_graph: for a second derivative the gradient is computed from logits that are part of the graph
        read = _Read.apply(logits, lambda: loss.logits().view(logits.cell.shape).to(logits.cell.dtype))
        return torch.autograd.grad(loss.of(read), read, grad, create_graph=True)[0], None


_ALIASES = {
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.view.default,
}  # called by autograd functions that return their inputs
_METADATA = {
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.ndim.__get__,
    Tensor.layout.__get__,
    Tensor.is_cuda.__get__,
    Tensor.is_cpu.__get__,
    Tensor.is_meta.__get__,
    Tensor.is_sparse.__get__,
    Tensor.is_quantized.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.__len__,
    Tensor.get_device,
}
_OF_GRAPH = {
    Tensor.requires_grad.__get__,
    Tensor.grad_fn.__get__,
    Tensor.is_leaf.__get__,
    Tensor.retains_grad.__get__,
    Tensor.retain_grad,
    Tensor.grad.__get__,
    Tensor.grad.__set__,
    Tensor.grad.__delete__,
    Tensor.register_hook,
    Tensor.backward,
    torch.autograd.grad,
    torch.autograd.backward,
}
_MAKES_GRADIENTS = {Tensor.retain_grad, Tensor.backward, torch.autograd.grad, torch.autograd.backward}
