"""The language-model head in training: logits that are not computed until somebody looks, and a loss that never does."""

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

import qvl_kernels
from qvl_model.modules import linear
from qvl_model.modules.plain import kernels_take

__all__ = ["LazyLogits", "Linear", "causal_loss"]


class LazyLogits(Tensor):
    """hidden @ weight.T, computed at its first use other than asking for its shape, dtype or device.

    Any function of PyTorch on it sees the real, differentiable logits; ``causal_loss`` takes ``hidden`` and ``weight`` instead,
    so that a training step whose logits nobody reads never holds them [arXiv:2411.09009].
    """

    @staticmethod
    def __new__(cls, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> "LazyLogits":
        return Tensor._make_wrapper_subclass(cls, (*hidden.shape[:-1], weight.shape[0]), dtype=dtype, device=hidden.device)

    def __init__(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
        self.hidden, self.weight, self._value = hidden, weight, None

    def value(self) -> Tensor:
        """The logits themselves."""
        if self._value is None:
            with torch._C.DisableTorchFunctionSubclass():
                dtype = self.dtype
            self._value = qvl_kernels.linear(self.hidden, self.weight).to(dtype)
        return self._value

    def cast(self, dtype: torch.dtype) -> "LazyLogits | Tensor":
        return self._value.to(dtype) if self._value is not None else LazyLogits(self.hidden, self.weight, dtype)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.requires_grad.__get__:
            return args[0].hidden.requires_grad or args[0].weight.requires_grad
        if func is Tensor.float and len(args) == 1 and not kwargs:  # what mixed-precision wrappers do to every output
            return args[0].cast(torch.float32)
        if func is Tensor.to and len(args) == 2 and isinstance(args[1], torch.dtype) and not kwargs:
            return args[0].cast(args[1])
        args, kwargs = torch.utils._pytree.tree_map(lambda x: x.value() if isinstance(x, LazyLogits) else x, (args, kwargs))
        return func(*args, **kwargs)


    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Reached only past ``__torch_function__``, where a result could not carry a gradient: no silent loss of it."""
        if func in _ALIASES:  # an autograd function that hands its input on
            return LazyLogits(args[0].hidden, args[0].weight, args[0].dtype)
        raise RuntimeError(f"{func} got logits that are not computed yet; pass outputs.logits.value()")


_ALIASES = {torch.ops.aten.alias.default, torch.ops.aten.detach.default, torch.ops.aten.view.default}
_METADATA = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.layout.__get__, Tensor.is_cuda.__get__,
    Tensor.is_cpu.__get__, Tensor.is_meta.__get__, Tensor.is_sparse.__get__, Tensor.is_quantized.__get__, Tensor.size, Tensor.dim,
    Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__, Tensor.get_device,
}  # fmt: skip


class Linear(linear.Linear):
    """``lm_head``: lazy while training, so that the loss may do without logits; else as every linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and self.bias is None and not torch.compiler.is_compiling():
            hidden, weight = input, self.weight
            device = hidden.device.type
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            with torch.autocast(device, enabled=False):
                taken = kernels_take(hidden, weight)
            if taken and (hidden.requires_grad or weight.requires_grad):
                return LazyLogits(hidden, weight, hidden.dtype)
        return super().forward(input)


def causal_loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch=None, ignore_index: int = -100, shift_labels=None, **kwargs):
    """``ForCausalLMLoss`` of transformers; of lazy logits through ``linear_cross_entropy``, which keeps no logits."""
    if not isinstance(logits, LazyLogits):
        return ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, ignore_index=ignore_index, shift_labels=shift_labels, **kwargs
        )
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, weight = logits.hidden, logits.weight
    with torch.autocast(hidden.device.type, enabled=False):
        loss = qvl_kernels.linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), weight, shift_labels.reshape(-1).to(hidden.device), ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )  # fmt: skip
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)
