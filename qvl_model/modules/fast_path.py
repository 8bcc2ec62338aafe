"""Is a module eligible for the fast path? Checked at every call, since adapters, hooks, modes and casts may come at any
time.
"""

import functools
import warnings
from collections.abc import Callable
from types import BuiltinFunctionType

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from transformers import PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock
from transformers.utils import output_capturing

from qvl_kernels import dispatch
from qvl_kernels.gpu import device as gpu_device
from qvl_kernels.library import TENSOR_TYPES, has_memory, ops_are_seen

__all__ = [
    "FAST_DTYPES",
    "FLASH",
    "attends_as_stock",
    "autocast_dtype",
    "dropout_fits",
    "is_eligible",
    "is_library_code",
    "is_number",
    "kernels_take",
    "mask_fits",
    "masks_as_stock",
    "no_global_hooks",
    "only_capture_hooks",
    "own",
    "runs_library_code",
    "stock_is_patched",
]

FLASH = ("flash_attention_2", "flash_attention_3")  # implementations of attention with one meaning
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Packages whose code is what fused layers and decode steps compute, or only wraps it.
_LIBRARIES = ("contextlib", "functools", "qvl_model", "torch", "transformers")


def is_library_code(function: Callable) -> bool:
    """Whether a function, and all that it wraps, were defined in a library. ``functools.wraps`` copies ``__module__``,
    so the module that a function runs in is asked.
    """
    while function is not None:
        if isinstance(function, BuiltinFunctionType):
            return True
        module = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None)
        if (module or "").partition(".")[0] not in _LIBRARIES:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def own(function: Callable) -> Callable | None:
    """A library's function, or None for one that was replaced before the import of the module that asks."""
    return function if is_library_code(function) else None


def _attention_function(implementation: str) -> Callable:
    return stock.ALL_ATTENTION_FUNCTIONS.get(implementation, stock.eager_attention_forward)


_ATTENTION_FUNCTIONS = {name: own(_attention_function(name)) for name in ("eager", "sdpa", "flex_attention", *FLASH)}


def attends_as_stock(implementation: str) -> bool:
    """Whether the attention function of this name is transformers' own, and not a registered replacement."""
    return _attention_function(implementation) is _ATTENTION_FUNCTIONS.get(implementation)


def masks_as_stock(config: PretrainedConfig) -> bool:
    """Whether transformers' own function makes the attention masks of a model with this config."""
    function = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    return function is None or is_library_code(function)


_CLASSES = [
    getattr(stock, f"Qwen3VL{name}")
    for name in (
        "TextAttention",
        "TextDecoderLayer",
        "TextMLP",
        "TextModel",
        "TextRMSNorm",
        "TextRotaryEmbedding",
        "VisionAttention",
        "VisionBlock",
        "VisionMLP",
        "VisionPatchEmbed",
    )
]
_CLASSES += [
    nn.Conv3d,
    nn.Embedding,
    nn.LayerNorm,
    nn.Linear,
    type(stock.ACT2FN["silu"]),
    type(stock.ACT2FN["gelu_pytorch_tanh"]),
]
_FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision", "create_causal_mask", "repeat_kv", "rotate_half")
_OF_PYTORCH = ("embedding", "gelu", "layer_norm", "linear", "scaled_dot_product_attention", "silu", "softmax")
_REPLACEABLE = [
    *((stock, name) for name in _FUNCTIONS),
    *((nn.functional, name) for name in _OF_PYTORCH),
    *((kind, "forward") for kind in _CLASSES),
    (nn.Module, "__call__"),
]
_STOCK = [own(getattr(owner, name)) for owner, name in _REPLACEABLE]


def stock_is_patched() -> bool:
    """Whether someone replaced a function of transformers' Qwen3-VL module or of PyTorch, or the forward of a class
    that the model has, for all models: the kernels compute what the originals compute.
    """
    return [getattr(owner, name) for owner, name in _REPLACEABLE] != _STOCK


def is_number(*values: object) -> bool:
    """Whether all settings are Python numbers; stock code takes tensors too, the kernels do not."""
    return all(type(value) is float or type(value) is int for value in values)


def is_eligible(module: nn.Module, kind: type, own_hook: type | None = None) -> bool:
    """Whether the module is fast-path eligible: its class is exactly ``kind`` (an adapter wraps or replaces it), its
    only hooks are pre-hooks of our class ``own_hook``, and no forward, weight or bias was replaced on the instance.
    Backward hooks count too: they may change gradients.
    """
    own = module.__dict__
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and (
            not module._forward_pre_hooks or all(type(hook) is own_hook for hook in module._forward_pre_hooks.values())
        )
        and "forward" not in own
        and "weight" not in own
        and "bias" not in own
    )


def runs_library_code(module: object, *names: str) -> bool:
    """Whether the methods of these names are those of a library's class, neither replaced on the instance or the class
    nor overridden in a user's subclass. Some versions lack some of them.
    """
    methods = (vars(base)[name] for name in names for base in _first_with(type(module), name))
    return not any(name in getattr(module, "__dict__", {}) for name in names) and all(map(is_library_code, methods))


def _first_with(kind: type, name: str) -> list[type]:
    """The class that a method comes from, or none; ``getattr`` would find methods of classes' own class."""
    return [base for base in kind.__mro__ if name in vars(base)][:1]


def no_global_hooks() -> bool:
    return not (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def only_capture_hooks(module: nn.Module, recorded: str) -> bool:
    """Whether every forward hook is transformers' recorder of ``recorded`` ("attentions" or "hidden_states"), and this
    call does not ask for these.
    """
    if module._forward_pre_hooks:
        return False
    if not module._forward_hooks:
        return True
    for hook in module._forward_hooks.values():
        if getattr(hook, "__module__", None) != output_capturing.__name__:
            return False
    return recorded not in (output_capturing._active_collector.get() or ())


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast casts the inputs of matmuls on ``device`` in this thread, or None if it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def dropout_fits(p: float, x: torch.Tensor) -> bool:
    """Whether the attention kernel has dropout: on GPUs. On the CPU PyTorch's own is faster than the reference."""
    return p == 0.0 or x.is_cuda or dispatch.forced() == "triton"


def mask_fits(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the attention kernel takes a mask: bool, or additive of q's dtype, of exactly these queries and keys.
    q, k: [B, H, T, D].
    """
    return mask is None or (
        mask.dtype in (torch.bool, q.dtype)
        and mask.dim() == 4
        and mask.shape[0] in (1, q.shape[0])
        and mask.shape[1] in (1, q.shape[1])
        and mask.shape[2] in (1, q.shape[2])
        and mask.shape[3] == k.shape[2]
    )


def _gpu_takes(device: torch.device) -> bool:
    reason = gpu_device.unavailable(device)
    if reason is not None and not torch.compiler.is_compiling():
        _say_once(reason)
    return reason is None


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"qvl_model: the model runs on stock code: {reason}", RuntimeWarning, stacklevel=5)


def kernels_take(*tensors: torch.Tensor | None, cast: bool = True) -> bool:
    """Whether the kernels take these tensors: on one device that has kernels, of one supported dtype, with a contiguous
    last dimension and memory that is not freed. Subclasses of Tensor are refused, since their values may be elsewhere,
    and so are calls in which a mode or a trace must see stock's operations.

    Args:
        cast: whether autocast would cast this op's inputs; if it is on, they must have its dtype already.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and (ops_are_seen() or stock_is_patched()):
        return False
    if compiling or not torch._C._len_torch_function_stack():
        return _are_eligible(tensors, cast, compiling)
    with (
        torch._C.DisableTorchFunction()
    ):  # a default device changes none of these answers, and costs a microsecond for each of them
        return _are_eligible(tensors, cast, compiling)


def _are_eligible(tensors: tuple[torch.Tensor | None, ...], cast: bool, compiling: bool) -> bool:
    first = tensors[0]
    on_cpu = first.is_cpu
    if not (on_cpu or first.is_cuda and _gpu_takes(first.device)) or first.dtype not in FAST_DTYPES:
        return False
    if cast and autocast_dtype(first.device) not in (None, first.dtype):
        return False
    dtype = first.dtype
    for x in tensors:  # a loop, not all(): this runs for every layer and token
        if x is not None and not (
            type(x) in TENSOR_TYPES
            and x.dtype is dtype
            and (x.is_cpu if on_cpu else x.device == first.device)
            and (x.stride(-1) == 1 or x.shape[-1] <= 1)
            and (compiling or has_memory(x))
        ):
            return False
    return True
