"""The weights themselves: heads, rows and columns of zeros; layers that repeat another one."""

import re

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qvl_model.capacity.report import CapacityReport
from qvl_model.capacity.spec import CapacitySpec, heads_of

__all__ = ["is_packed", "read", "shape_of", "storage_of", "weight_of"]

_CHUNK = 1 << 24  # elements looked at in one piece, so that no second copy of an embedding is made
# Projections of attention modules: how many heads one row block (or, for the output, column block) belongs to.
_ROW_HEADS = ("q_proj", "k_proj", "v_proj", "qkv")
_COLUMN_HEADS = ("o_proj", "out_proj", "proj")
_LISTED = 8


def is_packed(module: nn.Module) -> bool:
    """A linear layer or embedding whose weight is not a parameter but stored in a quantised format."""
    return isinstance(module, nn.Linear | nn.Embedding) and hasattr(module, "dequantize")


def shape_of(module: nn.Linear | nn.Embedding) -> tuple[int, int]:
    """Shape of the weight of a packed layer."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def weight_of(linear: nn.Module) -> Tensor | None:
    """The weight of a module as a plain tensor: gathered if it is sharded, dequantised if it is packed; None without values.

    Example:
        >>> weight_of(model.lm_head).shape
        torch.Size([151936, 2048])
    """
    if is_packed(linear):
        return linear.dequantize()
    return _values(linear.weight)


def _values(parameter: Tensor) -> Tensor | None:
    if parameter.is_meta:
        return None
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def storage_of(parameter: Tensor) -> tuple:
    """Equal for two parameters exactly if they are the same numbers in memory."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if local.numel() == 0:  # a rank's share of a small parameter: it has no memory to tell it by
        return (id(parameter),)
    try:
        return (local.device, local.data_ptr(), tuple(local.shape))
    except RuntimeError:  # a tensor subclass without storage of its own
        return (id(parameter),)


def read(model: nn.Module, spec: CapacitySpec, report: CapacityReport) -> None:
    """Adds every head, row and column of zeros and every repeated weight to ``report``."""
    prints: dict[tuple, list[str]] = {}
    unread = 0
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for own_name, parameter in _matrices(module):
            full_name = f"{name}.{own_name}".lstrip(".")
            if full_name in spec.shared:
                continue
            values = weight_of(module) if parameter is None else _values(parameter)
            if values is None:
                unread += 1
            elif values.dim() < 2:
                if not bool(values.any()):
                    _add_zero_vector(name, own_name, model, report)
            elif values.numel():
                if own_name == "weight":
                    values = values.reshape(values.shape[0], -1)
                    _check_zeros(name, module, modules.get(name.rpartition(".")[0]), values, report, packed=parameter is None)
                else:  # learned positions and queries: their channels come last
                    values = values.reshape(-1, values.shape[-1])
                    for what, alive in zip(("row", "channel"), _living(values)):
                        _add_lines(name, f"{own_name}: {what}", alive, report)
                prints.setdefault(_fingerprint(values), []).append(full_name)
    if unread:
        report.facts["weights"] = f"{unread} not read (meta device)"
    _report_repeats(model, prints, report)


def _add_zero_vector(name: str, own_name: str, model: nn.Module, report: CapacityReport) -> None:
    if own_name != "gate":
        report.add(name, "its weight is all zero")
    elif getattr(model.config, "cross_attention_gate_init", None) != 0:  # models may begin with closed gates, if their config says so
        report.add(name, "its gate is closed (0), so its cross-attention adds nothing")


def _matrices(module: nn.Module):
    """(name, parameter) of what is looked at: matrices, the weights of norms and the gates; (name, None) for a packed weight."""
    if is_packed(module):
        yield "weight", None
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.numel() and (parameter.dim() >= 2 or name == "gate" or (name == "weight" and "Norm" in type(module).__name__)):
            yield name, parameter


def _living(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of matrix [N, K] with anything but zeros in them, bool on the CPU."""
    rows, columns = [], torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    step = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        alive = matrix[start : start + step] != 0
        rows.append(alive.any(1))
        columns |= alive.any(0)
    return torch.cat(rows).cpu(), columns.cpu()


def _check_zeros(name: str, module: nn.Module, parent: nn.Module | None, matrix: Tensor, report: CapacityReport, *, packed: bool) -> None:
    rows, columns = _living(matrix)
    if not bool(rows.any()):
        report.add(name, f"its weight {list(matrix.shape)} is all zero")
        return
    heads = heads_of(parent) if parent is not None else None
    own_name = name.rpartition(".")[2]
    if heads is not None and own_name in _ROW_HEADS:
        rows = _without_dead_heads(name, rows, parent, "rows", report)
    elif heads is not None and own_name in _COLUMN_HEADS:
        columns = _without_dead_heads(name, columns, parent, "columns", report)
    if packed:  # a column may be small beside its neighbours in every row, and round to zeros; a row has its own scale
        columns = torch.ones_like(columns)
    if not isinstance(module, nn.Embedding):  # tokens that never occur may well have no embedding
        _add_lines(name, "output channel", rows, report)
    _add_lines(name, "input channel" if not isinstance(module, nn.Embedding) else "channel", columns, report)


def _without_dead_heads(name: str, alive: Tensor, attention: nn.Module, what: str, report: CapacityReport) -> Tensor:
    """Reports heads of which nothing lives; returns ``alive`` with these no longer dead, so that they are reported once."""
    size = attention.head_dim
    if alive.numel() % size:
        return alive
    blocks = alive.clone().view(-1, size)
    heads = heads_of(attention)
    for block in (~blocks.any(1)).nonzero().flatten().tolist():
        part = ""
        if name.endswith("qkv"):
            part = f" of the {('queries', 'keys', 'values')[block // heads % 3]}"
        elif name.endswith(("k_proj", "v_proj")) and blocks.shape[0] != heads:
            part = " of the key/value heads"
        report.add(name, f"head {block % heads}{part} is pruned: its {size} {what} are all zero")
        blocks[block] = True
    return blocks.view(-1)


def _add_lines(name: str, what: str, alive: Tensor, report: CapacityReport) -> None:
    dead = (~alive).nonzero().flatten().tolist()
    if dead:
        more = f" and {len(dead) - _LISTED} more" if len(dead) > _LISTED else ""
        listed = ", ".join(map(str, dead[:_LISTED]))
        report.add(name, f"{what}{'s' if len(dead) > 1 else ''} {listed}{more} of {len(alive)} {'are' if len(dead) > 1 else 'is'} all zero")


def _fingerprint(matrix: Tensor) -> tuple:
    """Equal for equal matrices; equal for others only by chance."""
    rows = matrix[: min(4, matrix.shape[0])].double()
    last = matrix[-1].double()
    return (tuple(matrix.shape), rows.sum().item(), rows.abs().sum().item(), last.sum().item(), last.square().sum().item())


def _report_repeats(model: nn.Module, prints: dict[tuple, list[str]], report: CapacityReport) -> None:
    """Weights with the same numbers as another one; a layer all of whose matrices repeat those of another is named as a whole."""
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
    for (mine, theirs), repeated in layers.items():
        if len(repeated) == sum(name.startswith(mine + ".") for name in everything):
            report.add(mine, f"repeats the weights of {theirs}")
        else:
            for name, other in repeated:
                report.add(name.rpartition(".")[0], f"has the weights of {other.rpartition('.')[0]}")


def _in_layer(name: str) -> tuple[str, str]:
    """(layer, rest) of a parameter's name: ("layers.3", "mlp.up_proj.weight"); ("", name) outside layers."""
    found = re.match(r"(.*\.\d+)\.(.+)", name)
    return found.groups() if found else ("", name)


def _same_numbers(model: nn.Module, name: str, other: str) -> bool:
    tensors = []
    for full_name in (name, other):
        owner, _, own_name = full_name.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module._parameters.get(own_name)
        tensors.append(weight_of(module) if parameter is None else _values(parameter))
    if tensors[0].data_ptr() == tensors[1].data_ptr() or not bool((tensors[0] != tensors[0].flatten()[0]).any()):
        return False  # one tensor under two names is the business of the structure; a constant matrix is not a copy
    return torch.equal(*tensors)
