"""The result of a capacity check."""

from dataclasses import dataclass, field

__all__ = ["CapacityError", "CapacityReport", "Violation"]

_SHOWN = 20


@dataclass(frozen=True)
class Violation:
    """A module (its name in the model; "" is the model itself) and what is wrong with it."""

    module: str
    problem: str

    def __str__(self) -> str:
        return f"{self.module or 'model'}: {self.problem}"


@dataclass
class CapacityReport:
    """Outcome of a capacity check.

    Attributes:
        model: class of the model.
        spec: name of the specification.
        facts: what was counted: layers, heads, parameters.
        violations: empty if the model is as specified.
    """

    model: str
    spec: str
    facts: dict[str, int | str] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.violations

    def add(self, module: str, problem: str) -> None:
        self.violations.append(Violation(module, problem))

    def __str__(self) -> str:
        lines = [f"{self.model} against {self.spec}"]
        lines += [
            f"  {name:32} {value:,}" if isinstance(value, int) else f"  {name:32} {value}"
            for name, value in self.facts.items()
        ]
        lines.append("capacity is complete" if self.ok else _listed(self.violations))
        return "\n".join(lines)


def _listed(violations: list[Violation]) -> str:
    count = len(violations)
    lines = [f"{count} violation{'s' if count > 1 else ''} of the specified capacity:"]
    lines += [f"  {violation}" for violation in violations[:_SHOWN]]
    if count > _SHOWN:
        lines.append(f"  and {count - _SHOWN} more")
    return "\n".join(lines)


class CapacityError(ValueError):
    """The model is not what its specification says.

    Attributes:
        report: the CapacityReport with every violation.
    """

    def __init__(self, report: CapacityReport) -> None:
        super().__init__(_listed(report.violations))
        self.report = report
