"""torch.library.opcheck of every registered qvl op, on the calls that the public functions make on their small fp32
cases.
"""

import importlib

import pytest
import torch
from op_cases import CONSTANTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import qvl_kernels
from qvl_kernels.ops import gemv
from qvl_kernels.ops.linear_cross_entropy.op import loss_sum_op
from qvl_kernels.ops.rope.op import qk_norm_rope_to_cache_op
from qvl_kernels.quantization import quantize

# One small case for every op that a public function calls, and for arguments that change the trace.
CALLS = [
    ("attention", "attention", "causal_square"),
    ("attention", "attention", "varlen_causal"),
    ("attention", "attention", "additive_mask"),
    ("cross_attention", "cross_attention", "lengths"),
    ("decode_attention", "decode_attention", "lengths"),
    ("decode_attention", "decode_attention", "int8_masked"),
    ("decoder_layer", "decoder_layer", "bool_mask"),
    ("gelu_tanh", "gelu_tanh", "odd_bias"),
    ("layer_norm", "layer_norm", "strided"),
    ("add_layer_norm", "layer_norm", "rank_3_odd"),
    ("linear", "linear", "rows_5"),
    ("linear", "linear", "strided"),
    ("linear_cross_entropy", "linear_cross_entropy", "sum_smoothed"),
    ("qk_norm_rope", "rope", "strided"),
    ("quantized_linear", "quantized_linear", "int8_odd_rows_3"),
    ("quantized_linear", "quantized_linear", "int4_odd_rows_33"),
    ("rms_norm", "rms_norm", "strided"),
    ("add_rms_norm", "rms_norm", "rank_3_odd"),
    ("swiglu", "swiglu", "strided"),
    ("vision_block", "vision_block", "odd"),
    ("vision_rope", "rope", "odd"),
]


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# Internal ops, and their arguments.
X, NORM = _rand(2, 3, 40), _rand(40)
INT8, INT4_ZEROS = quantize(_rand(5, 40), 8), quantize(_rand(5, 40), 4, 32, zero_points=True).tensors
HEADS, CACHE = (
    _rand(2, 3, 4, 16),
    (_rand(16), _rand(16), _rand(1, 3, 16), _rand(1, 3, 16), _rand(2, 4, 9, 16), _rand(2, 4, 9, 16)),
)
INTERNAL = [
    (gemv.gemv_op, (X, _rand(5, 40), _rand(5), NORM, 1e-6, _rand(2, 3, 5))),
    (gemv.gemv_op, (X, _rand(5, 40), None, None, 0.0, None)),
    (gemv.gemv_swiglu_op, (X, _rand(5, 40), _rand(5, 40), NORM, 1e-6)),
    (gemv.quantized_gemv_op, (X, INT8.values, INT8.scales, None, _rand(5), NORM, 1e-6, _rand(2, 3, 5))),
    (gemv.quantized_gemv_swiglu_op, (X, *INT4_ZEROS, *INT4_ZEROS, None, 1e-6)),
    (
        loss_sum_op,
        (
            _rand(7, 40).requires_grad_(),
            _rand(5, 40).requires_grad_(),
            torch.tensor([0, 1, 2, 3, 4, -100, 1]),
            -100,
            0.1,
            True,
            True,
        ),
    ),
    (
        loss_sum_op,
        (_rand(7, 40), _rand(5, 40).requires_grad_(), torch.tensor([0, 1, 2, 3, 4, -100, 1]), -100, 0.0, False, True),
    ),
    (qk_norm_rope_to_cache_op, (HEADS, HEADS, HEADS, *CACHE, torch.tensor([5, 0]), 0, 1e-6)),
    (qk_norm_rope_to_cache_op, (HEADS, HEADS, HEADS, *CACHE, None, 2, 1e-6)),
]
CASE_LISTS = {"add_layer_norm": "ADD_CASES", "add_rms_norm": "ADD_CASES", "vision_rope": "VISION_CASES"}
INFERENCE_ONLY = {"qvl::decode_attention", "qvl::decoder_layer", "qvl::vision_block"}


def _trained(op_name: str) -> bool:
    return op_name not in INFERENCE_ONLY and not op_name.endswith("_backward")


class Recorder(TorchDispatchMode):
    """Records the calls of qvl ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "qvl":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _differentiable(value):
    return value.detach().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _recorded(function: str, folder: str, case_name: str) -> list:
    """The qvl calls of one public call and, where it is differentiable, of its backward."""
    cases = getattr(importlib.import_module(f"qvl_kernels.ops.{folder}.cases"), CASE_LISTS.get(function, "CASES"))
    (case,) = (case for case in cases if case.name == case_name)
    arguments = case.make(torch.float32, torch.Generator().manual_seed(0))
    trained = _trained(f"qvl::{function}")
    if trained:
        arguments = {name: value if name in CONSTANTS else _differentiable(value) for name, value in arguments.items()}
    with torch.set_grad_enabled(trained), qvl_kernels.use_backend("cpp"), Recorder() as recorder:
        outputs = getattr(qvl_kernels, function)(**arguments)
        if trained:
            sum(out.sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    return recorder.calls


@pytest.mark.parametrize(("function", "folder", "case"), CALLS, ids=lambda value: value)
def test_opcheck(function, folder, case):
    calls = _recorded(function, folder, case)
    assert calls, f"{function} reached no qvl op"
    for op, args, kwargs in calls:
        change = _differentiable if _trained(op._schema.name) else torch.Tensor.detach
        torch.library.opcheck(op, tree_map(lambda x: change(x) if isinstance(x, torch.Tensor) else x, args), kwargs)


@pytest.mark.parametrize(
    ("op", "args"), INTERNAL, ids=lambda value: getattr(getattr(value, "_schema", None), "name", "")
)
def test_opcheck_of_internal_ops(op, args):
    torch.library.opcheck(op, args)


def test_backward_ops_are_once_differentiable():
    """Otherwise a second derivative would silently be missing."""
    seen = set()
    for call in CALLS:
        for op, args, kwargs in _recorded(*call):
            if op._schema.name.endswith("_backward"):
                seen.add(op._schema.name)
                outs = op(*(_differentiable(x) for x in args), **kwargs)
                with pytest.raises(RuntimeError, match=r"once differentiable.*use_backend\("):
                    sum(out.sum() for out in (outs if isinstance(outs, tuple) else (outs,))).backward()
    assert seen == {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("qvl::") and name.endswith("_backward")
    }


def test_every_registered_op_is_checked():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qvl::")}
    checked = {op._schema.name for call in CALLS for op, _, _ in _recorded(*call)} | {
        op._schema.name for op, _ in INTERNAL
    }
    assert checked == registered
