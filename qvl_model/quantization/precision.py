"""Which format each layer gets: by part or name pattern, and int8 for the most sensitive layers within a budget."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

__all__ = ["BUDGET", "by_pattern", "check_bits", "check_budget", "format_of", "int4_bits", "is_pattern", "mixed"]

BUDGET = 4.85  # average bits per weight
INT8_BITS = 8.0
SCALE_BITS, ZERO_BITS = 16, 4  # of a group of int4 weights
# How much an error in a layer's outputs matters, by the last part of its name: rise of log perplexity with that kind
# alone in int4, on a language model of 270 M parameters.
_KINDS = {
    "v_proj": 1.0,
    "qkv": 1.0,
    "down_proj": 1.0,
    "linear_fc2": 1.0,
    "fc2": 1.0,
    "up_proj": 1.0,
    "linear_fc1": 1.0,
    "fc1": 1.0,
    "gate_proj": 0.65,
    "k_proj": 0.35,
    "o_proj": 0.35,
    "proj": 0.35,
    "q_proj": 0.15,
}


def is_pattern(key: str) -> bool:
    """Whether a key of ``weights`` is a pattern of layer names, and not a part of the model."""
    return any(character in key for character in "*?[.")


def format_of(formats: Mapping[str, str | None], part: str, name: str) -> str | None:
    """The format of a layer: of the last pattern that matches its name, else of its part; None stays dense.

    Example:
        >>> format_of({"text": "int4", "*.down_proj": "int8"}, "text", "model.layers.0.mlp.down_proj")
        'int8'
    """
    found = by_pattern(formats, name)
    return found[-1] if found else formats.get(part)


def by_pattern(formats: Mapping[str, str | None], name: str) -> list[str | None]:
    """The formats of the patterns that match the name of a layer."""
    return [value for key, value in formats.items() if is_pattern(key) and fnmatchcase(name, key)]


def check_bits(bits: object) -> None:
    """Raises: TypeError unless ``bits`` is None or a number; ValueError unless it is above 4 and at most 8."""
    if bits is None:
        return
    if isinstance(bits, bool) or not isinstance(bits, int | float):
        raise TypeError(f"accelerate: bits must be a number, got {type(bits).__name__}")
    if not 4 < bits <= INT8_BITS:
        raise ValueError(f"accelerate: bits must be above 4 and at most 8, got {bits}")


def int4_bits(group: int, zero_points: bool) -> float:
    """Bits per int4 weight."""
    return 4 + (SCALE_BITS + ZERO_BITS * zero_points) / group


def check_budget(sizes: Mapping[str, int], low: float, bits: float) -> None:
    """Raises: ValueError if there are no int4 layers, or if their ``low`` bits per weight are more than ``bits``."""
    if not sizes:
        raise ValueError("accelerate: bits is the budget of int4 layers, and weights makes none; leave it out")
    if low > bits:
        raise ValueError(f"accelerate: int4 takes {low:g} bits per weight in these groups, bits={bits:g} is less")


def mixed(sizes: Mapping[str, int], low: float, bits: float, errors: Mapping[str, float] | None) -> set[str]:
    """Layers that are int8, of those that would be int4, for an average of at most ``bits`` per weight.

    Args:
        sizes: elements of the weight of each layer, by name, in the order of the model.
        low: bits per int4 weight.
        errors: relative squared error of the outputs of each layer in int4, from calibration; the layers with the
            largest gain per added bit are int8, gate and up together. None: v_proj, then the first and last
            layer, then down_proj from the ends inwards.
    """
    left, chosen = (bits - low) * sum(sizes.values()), set()
    units = _units(sizes)
    for unit in _by_error(units, sizes, errors) if errors is not None else _by_rule(list(units)):
        cost = (INT8_BITS - low) * sum(sizes[name] for name in units[unit])
        if cost <= left:
            chosen.update(units[unit])
            left -= cost
    return chosen


def _units(names: Iterable[str]) -> dict[str, list[str]]:
    """The layers that get one format together, by the name of one: gate and up, which one kernel reads."""
    units: dict[str, list[str]] = {}
    for name in names:
        before, gate, _ = name.partition("gate_proj")
        units.setdefault(f"{before}up_proj" if gate else name, []).append(name)
    return units


def _by_error(units: Mapping[str, list[str]], sizes: Mapping[str, int], errors: Mapping[str, float]) -> list[str]:
    gains = {
        unit: sum(_KINDS.get(name.rpartition(".")[2], 1.0) * errors[name] for name in names)
        / max(1, sum(sizes[name] for name in names))
        for unit, names in units.items()
        if all(name in errors for name in names)
    }
    return sorted(gains, key=lambda unit: -gains[unit])


def _by_rule(names: list[str]) -> list[str]:
    """The order of the fixed rule; the layers in it that are neither are never int8."""
    layers = list(dict.fromkeys(prefix for name in names if (prefix := _layer_of(name)) is not None))
    edge = {layer: min(i, len(layers) - 1 - i) for i, layer in enumerate(layers)}

    def rank(name: str) -> tuple[int, int] | None:
        layer, kind = _layer_of(name), name.rpartition(".")[2]
        if layer is None:
            return None
        if kind == "v_proj":
            return 0, 0
        if edge[layer] == 0:
            return 1, 0
        return (2, edge[layer]) if kind == "down_proj" else None

    ranked = {name: place for name in names if (place := rank(name)) is not None}
    return sorted(ranked, key=ranked.__getitem__)


def _layer_of(name: str) -> str | None:
    """The decoder layer that a linear layer is in: the name up to its number."""
    before, found, after = name.partition("language_model.layers." if "language_model" in name else "layers.")
    return f"{before}{found}{after.partition('.')[0]}" if found and "visual" not in name else None
