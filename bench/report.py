"""Report of a result: table on the terminal, JSON file, PNG chart, and the same table as Markdown (see bench/docs.py).

python -m bench.report RESULT.json    prints the table of a committed result
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench.families import FAMILIES, Family
from bench.targets import QUANTIZED, Target, not_slower, verdict

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "accuracy_passed",
    "columns",
    "family_of_result",
    "machine_line",
    "markdown_table",
    "print_table",
    "rows",
    "save",
]

_FIRST, _LAST = ("", "stock", "accelerated", "ratio", "range"), ("target", "result")
_COLOURS = {"pass": "#3a7d44", "miss": "#c98b2b", "at the limit": "#2f6690"}  # of the chart, by verdict


def family_of_result(result: dict) -> Family:
    return FAMILIES[result["options"].get("family", "qwen3-vl")]


def _number(target: Target, value: float) -> str:
    if target.unit == "%":
        return f"{100 * value:.1f} %"
    if target.unit == "cosine":
        return f"{value:.6f}"
    return f"{value:.3f}×" if target.at_most is not None else f"{value:.2f}×"


def _asked(result: dict, target: Target) -> bool:
    """Whether the run had the option that the target needs."""
    return not target.needs or bool(result["options"].get(target.needs))


def _speed_columns(result: dict) -> list[str]:
    """Columns of speed rows between range and target; older results have none."""
    metrics = result["metrics"].values()
    named = {"roofline": "roofline", "share": "of it", "kernels": "not slower"}
    if not result["options"].get(QUANTIZED):
        del named["kernels"]
    return [name for key, name in named.items() if any(key in metric for metric in metrics)]


def columns(result: dict) -> tuple[str, ...]:
    """The columns of ``rows``."""
    return (*_FIRST, *_speed_columns(result), *_LAST)


def _speed_cells(metric: dict) -> dict[str, str]:
    cells = {}
    if "roofline" in metric:
        cells = {"roofline": metric["roofline"], "of it": f"{100 * metric['share']:.0f} %"}
    if "kernels" in metric:
        kernels = " (PyTorch's kernels)" if metric["kernels"] == "pytorch" else ""
        cells["not slower"] = f"{'pass' if not_slower(metric) else 'miss'}{kernels}"
    return cells


def _result(target: Target, metric: dict) -> str:
    """The verdict; where the roofline leaves no room for the target, with the ratio at the roofline and its share."""
    found = verdict(target, metric["value"], metric.get("limit"))
    if found != "at the limit":
        return found
    return f"{found} ({metric['limit']:.2f}×, {100 * metric['share']:.0f} %)"


def rows(result: dict) -> Iterator[tuple[str, ...]]:
    """One row per measured metric: what, stock, accelerated, ratio, its range, then for speed the roofline, the share
    of it that is reached and whether it is as fast as stock at least, then target and verdict.
    """
    family, names = family_of_result(result), _speed_columns(result)
    for target in family.targets + family.notes:
        metric = result["metrics"].get(target.key)
        if metric is None or not _asked(result, target):
            continue
        low, high = (
            metric[end] if target.unit != "%" or metric[end] is None else 100 * metric[end] for end in ("low", "high")
        )
        spread = f"{low:.2f} to {high:.2f}" if low is not None else ""
        cells = _speed_cells(metric)
        yield (
            target.label,
            metric["stock"],
            metric["ours"],
            _number(target, metric["value"]),
            spread,
            *(cells.get(name, "") for name in names),
            target.text,
            _result(target, metric),
        )


def accuracy_rows(result: dict) -> list[tuple[str, ...]]:
    """Rows of the accuracy suite, in the columns of ``rows``."""
    accuracy, empty = result.get("accuracy"), ("",) * len(_speed_columns(result))
    return [(*row[: len(_FIRST)], *empty, *row[len(_FIRST) :]) for row in accuracy["rows"]] if accuracy else []


def accuracy_passed(result: dict) -> bool:
    """Whether the accuracy suite passed or was left out."""
    accuracy = result.get("accuracy")
    return accuracy is None or bool(accuracy["passed"])


def machine_line(result: dict) -> str:
    """One line that says what was measured where."""
    machine, sizes = result["machine"], result["sizes"]
    versions = ", ".join(
        f"{name} {version}" for name, version in machine["versions"].items() if name in ("torch", "transformers")
    )
    bandwidth = result["metrics"]["decode_share"]["bandwidth_gb_s"]
    units = ", ".join(f"{unit} {max(values):.0f}" for unit, values in result["raw"].get("peaks", {}).items())
    peaks = f"peaks in GFLOP/s: {units}; " if units else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {sizes['threads']} threads, {' '.join(machine['cpu_flags'])}; "
        f"kernels for "
        f"{result['cpu_info']['isa']}; read bandwidth {bandwidth:.1f} GB/s; {peaks}{versions}; "
        f"image of {sizes['patches']} patches = "
        f"{sizes['visual_tokens']} tokens + {sizes['text_tokens']} text tokens; {result['model']['description']}"
    )


def print_table(result: dict, console: "Console") -> None:
    """The table with targets and verdicts, then the machine and notes."""
    from rich.table import Table

    table = Table(*columns(result), title=family_of_result(result).title)
    colours = {"pass": "[green]pass[/]", "miss": "[yellow]miss[/]"}
    for row in [*rows(result), *accuracy_rows(result)]:
        table.add_row(*row[:-1], colours.get(row[-1], row[-1]))
    console.print(table)
    console.print(machine_line(result), style="dim", highlight=False)
    if result["model"]["random"]:
        console.print(
            "The weights are random: speed and memory are those of the real model, its answers would be noise.",
            style="dim",
        )
    for line in _kernels(result):
        console.print(f"kernels: {line}", style="dim", highlight=False)
    for case in result["raw"]["fallbacks"]:
        console.print(f"slow path taken: {case}", style="yellow")
    for name, reason in result["raw"].get("peers", {}).get("skipped", {}).items():
        console.print(f"peer {name} left out: {reason}", style="yellow")
    for option in (QUANTIZED, "peers", "all"):
        unmeasured = [
            target.label
            for target in family_of_result(result).targets
            if target.needs == option and not _asked(result, target)
        ]
        if unmeasured:
            console.print(f"Not measured without --{option}: {'; '.join(unmeasured)}.", style="dim")


def _kernels(result: dict) -> list[str]:
    """A line per kind of work: whose kernels, and both times; older results have those of one variant only."""
    kernels = result["raw"].get("routes", [])
    return (
        list(dict.fromkeys(line for lines in kernels.values() for line in lines))
        if isinstance(kernels, dict)
        else kernels
    )


def save(result: dict, folder: Path, name: str) -> tuple[Path, Path]:
    """Writes NAME.json and NAME.png and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, chart = folder / f"{name}.json", folder / f"{name}.png"
    data.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    _chart(result, chart)
    return data, chart


def _chart(result: dict, file: Path) -> None:
    """Speed-ups with their targets on the left; ratios of memory and error, where less is better, on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    family = family_of_result(result)
    measured = [
        target
        for target in family.targets
        if target.key in result["metrics"] and target.unit == "x" and _asked(result, target)
    ]
    panels = [
        ("times as fast as stock", [t for t in measured if t.at_least is not None]),
        ("of stock's (less is better)", [t for t in measured if t.at_most is not None]),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 1.6 + 0.42 * max(len(targets) for _, targets in panels)))
    for axis, (title, targets) in zip(axes, panels):
        for place, target in enumerate(reversed(targets)):
            metric = result["metrics"][target.key]
            bound = target.at_least if target.at_least is not None else target.at_most
            colour = _COLOURS[verdict(target, metric["value"], metric.get("limit"))]
            axis.barh(place, metric["value"], color=colour, height=0.6)
            axis.plot([bound, bound], [place - 0.4, place + 0.4], color="black", linewidth=2)
            axis.annotate(
                _number(target, metric["value"]),
                (0, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color="white",
            )
        axis.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(targets)), [target.label for target in reversed(targets)])
        axis.set_xlabel(f"{title}; black: target")
        axis.margins(x=0.15)
    figure.suptitle(f"{family.title}, on CPU")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def markdown_table(result: dict) -> str:
    """The same rows as Markdown, with how they were measured."""
    header = columns(result)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in [*rows(result), *accuracy_rows(result)]]
    command = "make bench-all" if result["options"]["all"] else "make bench"
    command += "" if family_of_result(result).name == "qwen3-vl" else f" FAMILY={family_of_result(result).name}"
    extra = [f"--{option}" for option in (QUANTIZED, "peers") if result["options"].get(option)]
    command += f' ARGS="{" ".join(extra)}"' if extra and not result["options"]["all"] else ""
    lines += [
        "",
        f"`{command}` on {machine_line(result)}. Commit {result['machine']['commit']}, {result['date']}. "
        "Medians of alternating pairs; the range is over pairs.",
    ]
    return "\n".join(lines)


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(description="Show a result of python -m bench.")
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())
    print_table(result, Console(width=None if sys.stdout.isatty() else 140))


if __name__ == "__main__":
    main()
