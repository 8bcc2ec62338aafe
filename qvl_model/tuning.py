"""The kinds of work in a model for which ``qvl_kernels.tuning`` chooses kernels."""

from collections import Counter

import torch
from torch import nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from qvl_kernels import backends, tuning
from qvl_kernels.ops.attention.selection import attention_work
from qvl_kernels.ops.linear.selection import linear_work
from qvl_kernels.ops.quantized_linear.selection import quantized_linear_work
from qvl_model.quantization.modules import PackedLinear

__all__ = ["describe_kernels", "settle_kernels"]

LEAST_WEIGHT = 1 << 20  # elements: below, calls take longer than kernels, and the static table is good enough


def settle_kernels(model: nn.Module) -> None:
    """Chooses kernels for a model on the CPU; measures those that were not measured before on this machine."""
    if all(x.is_cpu for x in model.parameters()) and _extension_is_there():
        tuning.settle(_works(model))


def describe_kernels(model: nn.Module) -> list[str]:
    """A line per kind of work of a model that is on the CPU, or on the meta device."""
    if any(x.is_cuda for x in model.parameters()) or not _extension_is_there():
        return []
    return tuning.describe(_works(model))


def _extension_is_there() -> bool:
    return bool(backends()["cpp"]["available"])


def _works(model: nn.Module) -> list[tuning.Work]:
    """One of each kind, of the shape that most weights have; the linear layers of prompts last, since they get the time
    that others leave.
    """
    attention: dict[str, tuning.Work] = {}
    dense: dict[torch.dtype, Counter[tuple[int, int]]] = {}  # elements by [N, K]
    # elements by [N, K], group and whether there are zero-points
    quantised: dict[tuple[torch.dtype, int], Counter[tuple[int, int, int, bool]]] = {}
    for name, module in model.named_modules():
        parameter = next(module.parameters(), None)  # of a quantised module: of the model's dtype
        if parameter is None:
            continue
        dtype = parameter.dtype
        if (
            isinstance(module, stock.Qwen3VLTextAttention | stock.Qwen3VLVisionAttention)
            and module.head_dim % tuning.TILE_K == 0
        ):
            work = _attention_work(module, dtype)
            attention[work.kind] = work
        if not isinstance(module, nn.Linear) or name.endswith("lm_head"):  # the head sees few tokens
            continue
        n, k = module.out_features, module.in_features
        if n * k < LEAST_WEIGHT or k % tuning.TILE_K:
            continue
        if isinstance(module, PackedLinear):
            weight = module.quantized
            format = n, k, weight.group, weight.zeros is not None
            quantised.setdefault((dtype, weight.bits), Counter())[format] += n * k
        else:
            dense.setdefault(dtype, Counter())[n, k] += n * k
    if not dense and not quantised:
        return []
    shapes = {dtype: found.most_common(1)[0][0] for dtype, found in dense.items()}
    works = [linear_work(dtype, n, k, few=True) for dtype, (n, k) in shapes.items()]
    works += attention.values()
    for (dtype, bits), found in quantised.items():
        n, k, group, zero_points = found.most_common(1)[0][0]
        works.append(quantized_linear_work(dtype, n, k, bits, group, zero_points))
    return works + [linear_work(dtype, n, k, few=False) for dtype, (n, k) in shapes.items()]


def _attention_work(module: nn.Module, dtype: torch.dtype) -> tuning.Work:
    causal = isinstance(module, stock.Qwen3VLTextAttention)
    heads = module.config.num_attention_heads if causal else module.num_heads
    return attention_work(dtype, heads, heads // module.num_key_value_groups, module.head_dim, causal=causal)
