"""Checks of weights: NaN; heads, rows and columns that are (nearly) zero; constant weights; repeated layers."""

import math
import re
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qvl_model.capacity.report import CapacityReport
from qvl_model.capacity.spec import CapacitySpec, heads_of

__all__ = ["check_finite", "is_finite", "is_quantized", "not_finite", "read", "shape_of", "storage_of", "weight_of"]

_CHUNK = 1 << 24  # elements read at a time, so that an embedding is not copied as a whole
# Relative to the median of its kind, or to 1 for a gate; smaller weights count as dead. Weight decay does not reach it.
_LIVE = 1e-6
_FLOOR = 1e-12  # largest absolute value of a weight that is dead in any case
_UNUSED = 0.01  # share of the vocabulary, at its end, that may be unused
# Projections of attention modules: how many heads one row block (or, for the output, column block) belongs to.
_ROW_HEADS = ("q_proj", "k_proj", "v_proj", "qkv")
_COLUMN_HEADS = ("o_proj", "out_proj", "proj")
_LISTED = 8


def is_quantized(module: nn.Module) -> TypeGuard[nn.Linear | nn.Embedding]:
    """Whether a linear layer or embedding has a quantised weight in place of a parameter."""
    return isinstance(module, nn.Linear | nn.Embedding) and hasattr(module, "dequantize")


def shape_of(module: nn.Linear | nn.Embedding) -> tuple[int, int]:
    """Shape [N, K] of the weight of a quantised layer."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def weight_of(linear: nn.Module) -> Tensor | None:
    """The weight of a module as a plain tensor: gathered if sharded, dequantised if quantised; None on the meta
    device.

    Example:
        >>> weight_of(model.lm_head).shape
        torch.Size([151936, 2048])
    """
    layer: Any = linear
    return layer.dequantize() if is_quantized(linear) else _values(layer.weight)


def _values(parameter: Tensor) -> Tensor | None:
    if parameter.is_meta:
        return None
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def storage_of(parameter: Tensor) -> tuple:
    """A key that is equal for two parameters exactly if they share memory."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if local.numel() == 0:  # the empty shard of a small parameter, which has no address
        return (id(parameter),)
    try:
        return (local.device, local.data_ptr(), tuple(local.shape))
    except RuntimeError:  # a tensor subclass without storage of its own
        return (id(parameter),)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf: one pass over its memory, nothing allocated."""
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # float8: no arithmetic
        tensor = tensor.float()
    return all(math.isfinite(value) for value in (extreme.item() for extreme in tensor.aminmax()))


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers with NaN or Inf in them.

    Example:
        >>> not_finite(model)
        []
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [name for name, tensor in tensors if (values := _values(tensor)) is not None and not is_finite(values)]


def check_finite(model: nn.Module, source: object) -> None:
    """Raises ValueError, naming ``source``, if a parameter or buffer holds NaN or Inf."""
    names = not_finite(model)
    if names:
        raise ValueError(
            f"{source} holds NaN or Inf in {len(names)} of the model's weights, such as {min(names)}; it is "
            f"damaged, or was saved after "
            "training went wrong: take an earlier or another copy"
        )


def read(model: nn.Module, spec: CapacitySpec, report: CapacityReport) -> None:
    """Adds NaN and Inf, every dead head, row and column, and every constant or repeated weight to ``report``."""
    prints: dict[tuple, list[str]] = {}
    sizes: dict[str, dict[str, float]] = {}  # same place in other layers -> full name -> largest absolute value
    unread = 0
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for own_name, tensor in _other_tensors(module):
            values = _values(tensor)
            if values is not None and not is_finite(values):
                report.add(name, f"{own_name} holds NaN or Inf")
        for own_name, parameter in _matrices(module):
            full_name = f"{name}.{own_name}".lstrip(".")
            if full_name in spec.shared:
                continue
            values = weight_of(module) if parameter is None else _values(parameter)
            if values is None:
                unread += 1
                continue
            if values.numel() == 0:
                continue
            matrix = (
                values.reshape(values.shape[0], -1)
                if own_name == "weight" and values.dim() > 1
                else values.reshape(-1, values.shape[-1])
            )
            rows, columns = _magnitudes(matrix)
            broken = int((~rows.isfinite()).sum())
            if broken:
                report.add(
                    name,
                    f"{own_name} holds NaN or Inf" + (f" in {broken} of {len(rows)} rows" if values.dim() > 1 else ""),
                )
                continue
            size = rows.max().item()
            if own_name == "gate":
                _check_gate(name, size, model, report)
                continue
            sizes.setdefault(re.sub(r"\.\d+\.", ".*.", full_name), {})[full_name] = size
            if values.dim() < 2 or size <= _FLOOR:
                continue
            if own_name == "weight":
                _check_lines(
                    name,
                    module,
                    modules.get(name.rpartition(".")[0]),
                    rows,
                    columns,
                    report,
                    quantised=parameter is None,
                )
            else:  # learned positions and queries: their channels come last
                for what, magnitudes in (("row", rows), ("channel", columns)):
                    _add_lines(name, f"{own_name}: {what}", magnitudes, report)
            if _is_constant(matrix, rows, columns):
                report.add(name, f"{own_name} {list(values.shape)} is constant: all of it is {matrix[0, 0].item():.3g}")
            prints.setdefault(_fingerprint(matrix), []).append(full_name)
    if unread:
        report.facts["weights"] = f"{unread} not read (meta device)"
    _compare_sizes(sizes, report)
    _report_repeats(model, prints, report)


def _check_gate(name: str, size: float, model: nn.Module, report: CapacityReport) -> None:
    begin = getattr(model.config, "cross_attention_gate_init", None)
    if size < _LIVE and (begin is None or abs(begin) >= _LIVE):  # a config may ask for gates that begin closed
        report.add(name, f"its gate is closed ({size:.3g}), so its cross-attention adds nothing")


def _compare_sizes(sizes: dict[str, dict[str, float]], report: CapacityReport) -> None:
    """Reports weights that are zero, or nearly zero relative to the same weight of other layers."""
    for names in sizes.values():
        limit = max(_limit(torch.tensor(list(names.values()), dtype=torch.float64)), _FLOOR)
        for name, size in names.items():
            if size <= limit:
                owner, _, own_name = name.rpartition(".")
                report.add(
                    owner,
                    f"its {own_name} is all zero"
                    if size == 0
                    else f"its {own_name} is next to nothing: at most {size:.1e}",
                )


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """(name, parameter) of matrices, weights of norms, and gates; (name, None) for a quantised weight."""
    if is_quantized(module):
        yield "weight", None
    for name, parameter in module._parameters.items():
        if (
            parameter is not None
            and parameter.numel()
            and (parameter.dim() >= 2 or name == "gate" or (name == "weight" and "Norm" in type(module).__name__))
        ):
            yield name, parameter


def _other_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of biases and buffers."""
    seen = {name for name, _ in _matrices(module)}
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in seen:
            yield name, tensor


def _magnitudes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute values of the (rows, columns) of matrix [N, K], fp64 on the CPU; NaN where there is one."""
    rows, columns = [], torch.zeros(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    step = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        sizes = matrix[start : start + step].abs()
        rows.append(sizes.amax(1))
        columns = torch.maximum(columns, sizes.amax(0))
    return torch.cat(rows).cpu().double(), columns.cpu().double()


def _limit(sizes: Tensor) -> float:
    """The size up to which elements of ``sizes`` are dead: 1e-6 of the median, and at least 1e-9 of the largest."""
    return max(_LIVE * sizes.median().item(), _LIVE**1.5 * sizes.max().item())


def _is_constant(matrix: Tensor, rows: Tensor, columns: Tensor) -> bool:
    if matrix.numel() == 1 or rows.min() != rows.max() or columns.min() != columns.max():
        return False
    return not bool((matrix != matrix[0, 0]).any())


def _check_lines(
    name: str,
    module: nn.Module,
    parent: nn.Module | None,
    rows: Tensor,
    columns: Tensor,
    report: CapacityReport,
    *,
    quantised: bool,
) -> None:
    heads = heads_of(parent) if parent is not None else None
    own_name = name.rpartition(".")[2]
    if parent is not None and heads is not None and own_name in _ROW_HEADS:
        rows = _without_dead_heads(name, rows, parent, "rows", report)
    elif parent is not None and heads is not None and own_name in _COLUMN_HEADS:
        columns = _without_dead_heads(name, columns, parent, "columns", report)
    if isinstance(module, nn.Embedding):
        _add_lines(name, "row", _without_unused(module, rows), report)
    else:
        _add_lines(name, "output channel", rows, report)
    if not quantised:  # small columns may round to zero under the scales of rows; a row has its own scale
        _add_lines(name, "input channel" if not isinstance(module, nn.Embedding) else "channel", columns, report)


def _without_unused(embedding: nn.Embedding, rows: Tensor) -> Tensor:
    """``rows`` with padding, and a few unused rows at the end of the vocabulary, set to the largest."""
    rows = rows.clone()
    if embedding.padding_idx is not None:
        rows[embedding.padding_idx] = rows.max()
    alive = (rows > _limit(rows)).nonzero().flatten()
    end = int(alive[-1]) + 1
    if len(rows) - end <= _UNUSED * len(rows):
        rows[end:] = rows.max()
    return rows


def _without_dead_heads(name: str, sizes: Tensor, attention: Any, what: str, report: CapacityReport) -> Tensor:
    """Reports dead heads; returns ``sizes`` with these set to the largest, so that they are reported once."""
    size = attention.head_dim
    if sizes.numel() % size:
        return sizes
    blocks = sizes.clone().view(-1, size)
    heads, largest = heads_of(attention), blocks.amax(1)
    groups = largest.split(heads) if name.endswith("qkv") else (largest,)
    dead = torch.cat([group <= _limit(group) for group in groups])
    for block in dead.nonzero().flatten().tolist():
        part = ""
        if name.endswith("qkv"):
            part = f" of the {('queries', 'keys', 'values')[block // heads % 3]}"
        elif name.endswith(("k_proj", "v_proj")) and blocks.shape[0] != heads:
            part = " of the key/value heads"
        report.add(name, f"head {block % heads}{part} is pruned: its {size} {what} are {_how_dead(largest[block])}")
        blocks[block] = sizes.max()
    return blocks.view(-1)


def _how_dead(size: Tensor) -> str:
    return "all zero" if size == 0 else f"next to nothing (at most {size.item():.1e})"


def _add_lines(name: str, what: str, sizes: Tensor, report: CapacityReport) -> None:
    dead = (sizes <= _limit(sizes)).nonzero().flatten().tolist()
    if dead:
        more = f" and {len(dead) - _LISTED} more" if len(dead) > _LISTED else ""
        listed = ", ".join(map(str, dead[:_LISTED]))
        many = len(dead) > 1
        report.add(
            name,
            f"{what}{'s' if many else ''} {listed}{more} of {len(sizes)} {'are' if many else 'is'} "
            f"{_how_dead(sizes[dead].max())}",
        )


def _fingerprint(matrix: Tensor) -> tuple:
    """Equal for equal matrices; equal for others only by chance."""
    rows = matrix[: min(4, matrix.shape[0])].double()
    last = matrix[-1].double()
    return (
        tuple(matrix.shape),
        rows.sum().item(),
        rows.abs().sum().item(),
        last.sum().item(),
        last.square().sum().item(),
    )


def _report_repeats(model: nn.Module, prints: dict[tuple, list[str]], report: CapacityReport) -> None:
    """Reports weights that equal another weight, and as a whole layers whose matrices all equal those of another."""
    pairs = []
    for names in prints.values():
        for i, name in enumerate(names[1:], 1):
            for other in names[:i]:
                if _same_numbers(model, name, other):
                    pairs.append((name, other))
                    break
    layers: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, other in pairs:
        mine, theirs = _in_layer(name), _in_layer(other)
        if mine[1] == theirs[1] and mine[0] and theirs[0]:
            layers.setdefault((mine[0], theirs[0]), []).append((name, other))
        else:
            report.add(name.rpartition(".")[0], f"has the weights of {other.rpartition('.')[0]}")
    everything = [name for names in prints.values() for name in names]
    for (layer, original), repeated in layers.items():
        if len(repeated) == sum(name.startswith(layer + ".") for name in everything):
            report.add(layer, f"repeats the weights of {original}")
        else:
            for name, other in repeated:
                report.add(name.rpartition(".")[0], f"has the weights of {other.rpartition('.')[0]}")


def _in_layer(name: str) -> tuple[str, str]:
    """(layer, rest) of a parameter's name: ("layers.3", "mlp.up_proj.weight"); ("", name) outside layers."""
    found = re.match(r"(.*\.\d+)\.(.+)", name)
    return (found[1], found[2]) if found else ("", name)


def _same_numbers(model: nn.Module, name: str, other: str) -> bool:
    tensors: list[Any] = []
    for full_name in (name, other):
        owner, _, own_name = full_name.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module._parameters.get(own_name)
        tensors.append(weight_of(module) if parameter is None else _values(parameter))
    if tensors[0].data_ptr() == tensors[1].data_ptr() or not bool((tensors[0] != tensors[0].flatten()[0]).any()):
        return False  # one tensor under two names is reported by structure.py, a constant matrix by _is_constant
    return torch.equal(*tensors)
