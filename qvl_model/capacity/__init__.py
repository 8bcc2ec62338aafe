"""Architecture and weight integrity: has a model all layers, heads, channels and parameters of its specification, and
are none of them pruned?

    >>> from qvl_model import capacity
    >>> report = capacity.verify(model, "qwen3-vl-2b")     # CapacityError names every module that is not as specified
    >>> print(report)

The specification is a config. The model that it describes is built on the meta device and compared with the given
model, module by module. Then the weights are read once, to find NaN, and pruned heads, rows and columns, which are zero
or nearly zero. Accelerated, quantised and sharded models are checked as they are.
"""

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from qvl_model.capacity import structure, weights
from qvl_model.capacity.report import CapacityError, CapacityReport, Violation
from qvl_model.capacity.spec import SPECS, CapacitySpec, innermost
from qvl_model.capacity.weights import check_finite, not_finite, weight_of

__all__ = [
    "SPECS",
    "CapacityError",
    "CapacityReport",
    "CapacitySpec",
    "Violation",
    "check_finite",
    "examine",
    "not_finite",
    "verify",
    "weight_of",
]

Spec = CapacitySpec | PreTrainedConfig | str | None


def examine(
    model: nn.Module, spec: Spec = None, *, training: bool = False, optimizer: Optimizer | None = None
) -> CapacityReport:
    """As ``verify``, but returns violations in the report instead of raising."""
    if hasattr(model, "get_base_model"):
        raise TypeError("capacity: the model carries adapters (PEFT); merge them first: model.merge_and_unload()")
    inner = innermost(model)
    expected = CapacitySpec.of(spec if spec is not None else inner.config, type(inner))
    report = structure.compare(inner, expected)
    weights.read(inner, expected, report)
    if training:
        structure.check_trainable(inner, report, optimizer)
    return report


def verify(
    model: nn.Module, spec: Spec = None, *, training: bool = False, optimizer: Optimizer | None = None
) -> CapacityReport:
    """Checks that nothing of the model was removed, pruned, shared, replaced or (in training) frozen.

    Checked are: layer and head counts; the class, sizes, factors and parameter shapes of every module; the number of
    parameters; that no parameter or buffer holds NaN or Inf; that no attention head, row (of a vocabulary too) or
    column of a weight is zero, or so small beside the others (a millionth of their median) that it does nothing; that
    no weight is constant and no gate closed; that no two layers or weights are one and the same; and, with
    ``training``, that every parameter asks for a gradient and is known to the optimizer. Rows of padding, and up to a
    hundredth of a vocabulary at its end, may be empty.

    Args:
        model: Qwen3-VL or QVL (with or without its head), stock, accelerated, quantised, inside DDP, or sharded by
            FSDP2 (then every rank must call this, since weights are gathered one by one). On the meta device only the
            structure is checked.
        spec: what the model must be: a name from ``SPECS``, a config, or a CapacitySpec. None takes the model's own
            config, which cannot notice layers that were removed from the config as well.
        training: also check that every parameter is trained.
        optimizer: the optimizer that must hold every parameter (only with ``training``).
    Returns:
        a report: counts that were found, no violations.
    Raises: CapacityError (a ValueError) that lists every violation with its module; TypeError for other models;
        ValueError for an unknown spec name.
    Example:
        >>> verify(model, "qwen3-vl-2b").facts["parameters"]
        2127532032
    """
    report = examine(model, spec, training=training, optimizer=optimizer)
    if report.violations:
        raise CapacityError(report)
    return report
