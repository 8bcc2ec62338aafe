"""Every op with its shared cases, and how to call and differentiate it: for the tests of all backends."""

import importlib

import torch

import qvl_kernels
from qvl_kernels.quantization import QuantizedWeight

# op -> (folder in qvl_kernels/ops, name of its case list)
CASE_LISTS = {
    "attention": ("attention", "CASES"),
    "cross_attention": ("cross_attention", "CASES"),
    "decode_attention": ("decode_attention", "CASES"),
    "rms_norm": ("rms_norm", "CASES"),
    "add_rms_norm": ("rms_norm", "ADD_CASES"),
    "layer_norm": ("layer_norm", "CASES"),
    "add_layer_norm": ("layer_norm", "ADD_CASES"),
    "qk_norm_rope": ("rope", "CASES"),
    "vision_rope": ("rope", "VISION_CASES"),
    "swiglu": ("swiglu", "CASES"),
    "gelu_tanh": ("gelu_tanh", "CASES"),
    "patch_embed": ("patch_embed", "CASES"),
    "linear": ("linear", "CASES"),
    "quantized_linear": ("quantized_linear", "CASES"),
    "linear_cross_entropy": ("linear_cross_entropy", "CASES"),
    "decoder_layer": ("decoder_layer", "CASES"),
    "vision_block": ("vision_block", "CASES"),
}
OPS = {
    op: (getattr(qvl_kernels, op), getattr(importlib.import_module(f"qvl_kernels.ops.{folder}.cases"), cases))
    for op, (folder, cases) in CASE_LISTS.items()
}

INFERENCE_ONLY = {"decode_attention", "decoder_layer", "vision_block"}
CONSTANTS = {"cos", "sin"}  # the cos/sin cache has no gradient: transformers computes it under no_grad


def outputs(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def map_tensors(function, value):
    """function over every floating-point tensor of a value, those inside NamedTuples too."""
    if isinstance(value, dict):
        return {name: map_tensors(function, item) for name, item in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(map_tensors(function, item) for item in value))
    return function(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def double(arguments: dict) -> dict:
    return map_tensors(torch.Tensor.double, arguments)


def reference(function, arguments: dict):
    with qvl_kernels.use_backend("reference"):
        return outputs(function(**arguments))


def differentiable(arguments: dict) -> dict:
    return {
        name: value
        if name in CONSTANTS or isinstance(value, QuantizedWeight)
        else map_tensors(lambda x: x.detach().requires_grad_(), value)
        for name, value in arguments.items()
    }


# Cases for second derivatives: a small one of every differentiable op, and one for each branch of its backward.
TWICE = [
    ("attention", "causal_longer_keys"),
    ("attention", "varlen_causal"),
    ("attention", "bool_mask"),
    ("attention", "additive_mask"),
    ("attention", "left_padding"),
    ("cross_attention", "lengths"),
    ("rms_norm", "strided"),
    ("add_rms_norm", "rank_3_odd"),
    ("layer_norm", "strided"),
    ("add_layer_norm", "rank_3_odd"),
    ("qk_norm_rope", "strided"),
    ("vision_rope", "odd"),
    ("swiglu", "strided"),
    ("gelu_tanh", "odd_bias"),
    ("patch_embed", "odd"),
    ("linear", "rows_5"),
    ("quantized_linear", "int8_odd_rows_3"),
    ("linear_cross_entropy", "mean"),
    ("linear_cross_entropy", "sum_smoothed"),
    ("linear_cross_entropy", "none"),
]


def penalty_gradients(function, arguments: dict, cotangents) -> list[torch.Tensor]:
    """Derivatives of the squared norm of the gradients (a gradient penalty) with respect to inputs and cotangents."""
    inputs = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    results = [out for out in outputs(function(**arguments)) if out.requires_grad]
    cotangents = [cotangent.to(out.dtype).requires_grad_() for out, cotangent in zip(results, cotangents)]
    first = torch.autograd.grad(results, inputs, cotangents, create_graph=True)
    return list(
        torch.autograd.grad(sum(x.square().sum() for x in first), [*inputs, *cotangents], materialize_grads=True)
    )


def gradients(function, arguments: dict, cotangents) -> list[torch.Tensor]:
    inputs = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    results = [out for out in outputs(function(**arguments)) if out.requires_grad]
    loss = sum((out * cotangent.to(out.dtype)).sum() for out, cotangent in zip(results, cotangents))
    return list(torch.autograd.grad(loss, inputs))
