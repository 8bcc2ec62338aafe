"""The language-model head in training: logits that are computed only when they are read, and a loss without logits."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss import loss_utils
from transformers.loss.loss_utils import ForCausalLMLoss

from qvl_model.modules import linear
from qvl_model.modules.fast_path import kernels_take, own
from qvl_model.modules.lazy_logits import LazyLogits, lazy_logits, lazy_loss

__all__ = ["Forwards", "Linear", "causal_loss", "set_skip_logits"]

_current = (
    threading.local()
)  # .forward: the Forwards whose model has run in this thread, and whose head has not; .skip_logits: of this call


class Forwards:
    """Forward pre-hook of the model under the head, which wrappers around the whole model always call. It counts calls,
    and takes ``skip_logits`` out of their arguments.

    Args:
        skip_logits: for calls that do not say; see ``accelerate``.
    """

    def __init__(self, skip_logits: bool) -> None:
        self.skip_logits, self.count = skip_logits, 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        kwargs = dict(kwargs)
        skip_logits = kwargs.pop("skip_logits", None)
        if not torch.compiler.is_compiling() and not getattr(
            module, "_is_replica", False
        ):  # DataParallel gathers logits
            self.count += 1
            _current.forward, _current.skip_logits = self, self.skip_logits if skip_logits is None else skip_logits
        return args, kwargs


def set_skip_logits(model: nn.Module, skip_logits: bool | None) -> None:
    """Whether calls of ``model`` (which has a head, and a ``model`` under it) skip logits; None removes the setting."""
    body = model.model
    for handle in [handle for handle, hook in body._forward_pre_hooks.items() if isinstance(hook, Forwards)]:
        del body._forward_pre_hooks[handle]
        body._forward_pre_hooks_with_kwargs.pop(handle, None)
    if skip_logits is not None:
        body.register_forward_pre_hook(Forwards(skip_logits), with_kwargs=True)


class Linear(linear.Linear):
    """``lm_head``: in a training forward its logits are lazy, so that the loss can skip them; else a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        forward, _current.forward = getattr(_current, "forward", None), None
        if (
            forward is not None
            and _current.skip_logits
            and self.training
            and torch.is_grad_enabled()
            and self.bias is None
        ):
            hidden, weight = input, self.weight
            device = hidden.device.type
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            with torch.autocast(device, enabled=False):
                taken = kernels_take(hidden, weight)
            if taken and (hidden.requires_grad or weight.requires_grad) and _have_fingerprints(hidden, weight):
                return lazy_logits(hidden, weight, (hidden is not input, weight is not self.weight), forward)
        return super().forward(input)


def _have_fingerprints(*tensors: Tensor) -> bool:
    """Whether changes of tensors can be detected. Inference tensors have no version counter, and comparing fingerprints
    waits for the GPU, which the capture of a CUDA graph does not allow.
    """
    capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
    return not capturing and not any(x.is_inference() for x in tensors)


# What ``linear_cross_entropy`` computes instead, if nobody has replaced it.
_OF_THE_LOSS = ((loss_utils, "fixed_cross_entropy"), (nn.functional, "cross_entropy"))
_STOCK_LOSS = [own(getattr(owner, name)) for owner, name in _OF_THE_LOSS]


def causal_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """``ForCausalLMLoss`` of transformers. For lazy logits it runs ``linear_cross_entropy``, which computes the loss
    without storing logits.
    """
    theirs = not isinstance(logits, LazyLogits) or logits.computed or logits.shape[-1] != vocab_size
    if theirs or [getattr(owner, name) for owner, name in _OF_THE_LOSS] != _STOCK_LOSS:
        return ForCausalLMLoss(
            logits,
            labels,
            vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            **kwargs,
        )
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = lazy_loss(logits, shift_labels.reshape(-1).to(logits.device), ignore_index, reduction)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)
