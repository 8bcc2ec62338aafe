"""Registration of ops with PyTorch under ``qvl::``."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from qvl_kernels import config, dispatch

__all__ = [
    "AUTOGRAD",
    "LAUNCHERS",
    "TENSOR_TYPES",
    "call",
    "differentiable_gradients",
    "has_memory",
    "is_eligible",
    "ops_are_seen",
    "register",
    "needs_dispatcher",
]

_LIBRARY = torch.library.Library("qvl", "DEF")
LAUNCHERS: dict[str, Callable] = {}  # op name -> its Triton launcher
AUTOGRAD: dict[str, tuple[Callable, Callable | None]] = {}  # op name -> (backward, setup_context)
_CPU: dict[Callable, Callable] = {}  # op -> its CPU kernel
_GPU: dict[Callable, Callable] = {}  # op -> its Triton launcher
TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)


def _dispatch_keys(x: torch.Tensor) -> int:
    """The dispatch keys of a tensor, as bits."""
    return torch._C._dispatch_keys(x).raw_repr()


@functools.cache
def _eager_dispatch_keys(device: str) -> frozenset[int]:
    """The dispatch keys of eligible tensors on ``device``, in inference mode and outside of it."""
    found = set()
    for inference in (True, False):
        with torch.inference_mode(inference):
            found.add(_dispatch_keys(torch.empty(0, device=device)))
    return frozenset(found)


_eager_dispatch_keys("cpu")  # at import, while nothing traces or compiles


def is_eligible(x: torch.Tensor, device: str) -> bool:
    """Whether kernels may read a tensor's memory directly: on ``device`` ("cpu" or "cuda"), dense, not fake, without a
    negative or conjugate bit, no subclass, ...
    """
    return type(x) in TENSOR_TYPES and _dispatch_keys(x) in _eager_dispatch_keys(device)


def has_memory(x: torch.Tensor) -> bool:
    """Whether the storage of an eligible tensor holds all of it: sharding libraries free storages of live tensors."""
    there = x.untyped_storage().nbytes()
    if x.is_contiguous():
        return there >= x.storage_offset() * x.itemsize + x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return not x.nbytes or there >= (x.storage_offset() + last + 1) * x.itemsize


def ops_are_seen() -> bool:
    """Whether something in this thread must see PyTorch's own operations: a mode, torch.func (grad, vmap, ...), or
    forward-mode AD. The mode of ``torch.set_default_device`` does not count.
    """
    modes = torch._C._len_torch_function_stack()
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or modes
        and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(modes))
    )


def register(
    schema: str,
    *,
    cpu: Callable,
    fake: Callable,
    triton: Callable | None = None,
    backward: Callable | None = None,
    double_backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Callable:
    """Registers an op with ``torch.library`` and returns it (``torch.ops.qvl.<name>.default``).

    ``fake``: the meta kernel. ``triton``: the launcher on GPUs, which imports Triton only when it is called.
    ``double_backward``: replaces ``backward`` where its results are differentiated again (``create_graph=True``). Ops
    named ``*_backward`` are once differentiable: a derivative of their results raises.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if triton is not None:
        LAUNCHERS[name] = triton
        _LIBRARY.impl(name, triton, "CUDA")
        if config.interpreted():
            cpu = _either(cpu, triton)
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"qvl::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        AUTOGRAD[name] = backward, setup_context
        torch.library.register_autograd(
            f"qvl::{name}", _either_order(backward, double_backward), setup_context=setup_context, lib=_LIBRARY
        )
    elif name.endswith("_backward"):
        torch.library.register_autograd(f"qvl::{name}", _once_differentiable(name), lib=_LIBRARY)
    op = getattr(torch.ops.qvl, name).default
    _CPU[op] = cpu
    if triton is not None:
        _GPU[op] = triton
    return op


def _either_order(backward: Callable, double_backward: Callable | None) -> Callable:
    if double_backward is None:
        return backward
    return lambda ctx, *grads: (double_backward if torch.is_grad_enabled() else backward)(ctx, *grads)


def _once_differentiable(name: str) -> Callable:
    def refuse(ctx: Any, *grads: torch.Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"qvl::{name} is once differentiable: there is no second derivative of {name.removesuffix('_backward')} "
            f"here. "
            'Run its forward inside qvl_kernels.use_backend("reference"), which has derivatives of every order'
        )

    return refuse


def differentiable_gradients(
    function: Callable, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Gradients of ``function`` (made of PyTorch operations) that can be differentiated again in its inputs and
    ``grads``; None for inputs that need no gradient.

    Example:
        >>> differentiable_gradients(swiglu_reference, (gate, up), (grad,))
    """
    inputs = [x.view_as(x) for x in inputs]  # views: if one input was computed from another, that path must not count
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    pairs = [(out, grad) for out, grad in zip(outs, grads) if grad is not None and out.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    ends, grads = [out for out, _ in pairs], [grad for _, grad in pairs]
    found = iter(
        torch.autograd.grad(ends, wanted, grads, create_graph=True, allow_unused=True)
        if pairs
        else [None] * len(wanted)
    )
    return [next(found) if x.requires_grad else None for x in inputs]


def needs_dispatcher() -> bool:
    """Whether PyTorch's dispatcher must see every op: in this thread gradients, forward-mode AD, tracing, torch.func or
    a dispatch mode is on.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def call(op: Callable, *args: Any) -> Any:
    """``op(*args)``, bypassing PyTorch's dispatcher where it has nothing to do: inference on eligible tensors.

    On CPUs the dispatcher takes 0.1 ms in decode, as the weights evict it from the CPU caches between calls. On GPUs
    the many small kernels of a prefill are bound by the host. Not for ops that write to an argument.

    Example:
        >>> y = call(rms_norm_op, x, weight, 1e-6)
    """
    if needs_dispatcher() or torch._C._len_torch_function_stack():
        return op(*args)
    kernels = _CPU
    for x in args:
        if isinstance(x, torch.Tensor):
            if x.is_cuda:
                kernels = _GPU
            if type(x) not in TENSOR_TYPES or _dispatch_keys(x) not in _eager_dispatch_keys(
                "cuda" if x.is_cuda else "cpu"
            ):
                return op(*args)
    return kernels[op](*args)


def _either(cpu: Callable, launcher: Callable) -> Callable:
    """Under Triton's interpreter CPU tensors run on the forced backend: the CPU kernel or the launcher."""
    return lambda *args: (launcher if dispatch.forced() == "triton" else cpu)(*args)
