"""Compares modules, parameters and sharing of a model with its specification."""

import torch
from torch import nn
from torch.optim import Optimizer

from qvl_model.capacity.report import CapacityReport
from qvl_model.capacity.spec import OWN_PACKAGES, CapacitySpec, heads_of, sizes_of
from qvl_model.capacity.weights import is_quantized, shape_of, storage_of

__all__ = ["check_trainable", "compare"]


def compare(model: nn.Module, spec: CapacitySpec) -> CapacityReport:
    """A report on what is missing, added, resized, replaced or shared in ``model``; weights are not read."""
    report = CapacityReport(type(model).__name__, spec.name)
    wrong = _compare_modules(model, spec, report)
    _compare_parameters(model, spec, report, wrong)
    _find_sharing(model, spec, report)
    _count(model, spec, report)
    report.violations.sort(
        key=lambda violation: violation.module != "" and "entries" not in violation.problem
    )  # totals first
    return report


def _inside(name: str, roots: set[str]) -> bool:
    """Whether ``name`` is one of ``roots`` or below one."""
    while name:
        if name in roots:
            return True
        name = name.rpartition(".")[0]
    return False


def _compare_modules(model: nn.Module, spec: CapacitySpec, report: CapacityReport) -> set[str]:
    """Returns the names of modules that are missing or of another class; their children are not compared."""
    found = dict(model.named_modules(remove_duplicate=False))
    wrong: set[str] = set()
    for name, (expected, sizes) in spec.modules.items():
        if name == "" or _inside(name, wrong):
            continue
        module = found.get(name)
        if module is None:
            wrong.add(name)
            report.add(name, f"missing; a {expected.__name__} belongs here")
            continue
        kind = type(module)
        if not isinstance(module, expected):
            wrong.add(name)
            report.add(name, f"is a {kind.__name__}; a {expected.__name__} belongs here")
        elif kind.__module__.partition(".")[0] not in OWN_PACKAGES:
            wrong.add(name)
            report.add(name, f"is a {kind.__module__}.{kind.__name__}, which neither transformers nor qvl defines")
        else:
            if "forward" in module.__dict__:
                report.add(name, "its forward was replaced on the instance")
            _compare_sizes(name, module, sizes, report)
    for name in found:
        if name not in spec.modules and not _inside(name, wrong):
            wrong.add(name)
            report.add(name, f"a {type(found[name]).__name__} that does not belong here")
    return wrong


def _compare_sizes(name: str, module: nn.Module, expected: dict[str, object], report: CapacityReport) -> None:
    sizes = sizes_of(module)
    for key, value in expected.items():
        if sizes.get(key) != value:
            found = f"has {sizes.get(key)} entries" if key == "entries" else f"{key} is {sizes.get(key)}"
            report.add(name, f"{found}, the specification says {value}")


def _compare_parameters(model: nn.Module, spec: CapacitySpec, report: CapacityReport, wrong: set[str]) -> None:
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, expected in spec.parameters.items():
        owner_name, _, own_name = name.rpartition(".")
        if _inside(owner_name, wrong):
            continue
        parameter, owner = found.get(name), model.get_submodule(owner_name)
        if own_name == "weight" and is_quantized(owner):
            shape: tuple[int, ...] = shape_of(owner)
        elif parameter is not None:
            shape = tuple(parameter.shape)
        else:
            report.add(owner_name, f"its parameter {own_name} is missing")
            continue
        if shape != expected:
            report.add(owner_name, f"{own_name} is {list(shape)}, the specification says {list(expected)}")
    for name in found:
        owner_name, _, own_name = name.rpartition(".")
        if name not in spec.parameters and not _inside(owner_name, wrong):
            report.add(owner_name, f"its parameter {own_name} does not belong here")


def _find_sharing(model: nn.Module, spec: CapacitySpec, report: CapacityReport) -> None:
    """Reports modules and tensors that are used twice although the specification has one for each use."""
    first: dict[int, str] = {}
    repeated: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if (
            any(True for _ in module.parameters())
            and first.setdefault(id(module), name) != name
            and not _inside(name, repeated)
        ):
            repeated.add(name)
            report.add(name, f"is the same module as {first[id(module)]}")
    owners: dict[tuple, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta or parameter.numel() == 0:
            continue
        original = owners.setdefault(storage_of(parameter), name)
        if original != name and spec.shared.get(name) != original and not _inside(name.rpartition(".")[0], repeated):
            report.add(name.rpartition(".")[0], f"{name.rpartition('.')[2]} is the same tensor as {original}")


def _count(model: nn.Module, spec: CapacitySpec, report: CapacityReport) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            report.facts[f"{name} (layers)"] = len(module)
    heads: dict[str, list[int]] = {}
    for module in model.modules():
        count = heads_of(module)
        if count is not None:
            heads.setdefault(type(module).__name__.removeprefix("FSDP"), []).append(count)
    for kind, counts in heads.items():
        report.facts[f"{kind} (heads)"] = f"{', '.join(map(str, sorted(set(counts))))} in each of {len(counts)}"
    count = sum(parameter.numel() for parameter in model.parameters())
    for name, module in model.named_modules():
        if is_quantized(module) and f"{name}.weight" not in spec.shared:
            rows, columns = shape_of(module)
            count += rows * columns
    report.facts["parameters"] = count
    if count != spec.count:
        report.add("", f"has {count:,} parameters, the specification says {spec.count:,}")


def check_trainable(model: nn.Module, report: CapacityReport, optimizer: Optimizer | None) -> None:
    """Every parameter asks for a gradient, and the optimizer (if given) holds it."""
    held = (
        None
        if optimizer is None
        else {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    )
    for name, parameter in model.named_parameters():
        owner, _, own_name = name.rpartition(".")
        if not parameter.requires_grad:
            report.add(owner, f"{own_name} is frozen (requires_grad is False)")
        elif held is not None and id(parameter) not in held:
            report.add(owner, f"{own_name} is not in the optimizer")
    for name, module in model.named_modules():
        if is_quantized(module):
            report.add(name, "its weight is quantised, which cannot be trained")
    if not torch.is_grad_enabled():
        report.add("", "gradients are switched off (torch.no_grad)")
