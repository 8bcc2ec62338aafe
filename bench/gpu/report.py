"""Report of `make bench-gpu`: tables, charts, and all GPU results as Markdown (see bench/docs.py).

python -m bench.gpu.report RESULT.json    prints the tables of a result
"""

import argparse
import json
import sys
from pathlib import Path

from bench.gpu.targets import TARGETS, bandwidth_share, speed
from bench.targets import verdict

__all__ = ["chart", "markdown_section", "tables"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SIDES = ("first", "decode", "replay", "vision", "forward", "backward")
BASELINES = ("stock", "eager", "compile", "sdpa", "flash", "cudnn", "flash-attn", "liger", "conv3d", "dequantised")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table, padded so that it reads well on a terminal too."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in [header, *rows]
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _measured(result: dict) -> dict[str, dict]:
    return {name: case["value"] for name, case in result["cases"].items() if "value" in case}


def target_rows(result: dict) -> list[tuple[str, ...]]:
    """What, value, target, verdict; an unmeasured one says so."""
    cases, rows = _measured(result), []
    for item in TARGETS:
        value = item.value(cases)
        shown = (
            "not measured" if value is None else f"{100 * value:.1f} %" if item.target.unit == "%" else f"{value:.2f}×"
        )
        rows.append(
            (
                item.target.label,
                shown,
                item.target.text + (" (stretch)" if item.stretch else ""),
                verdict(item.target, value),
            )
        )
    return rows


def _milliseconds(times: dict) -> str:
    return f"{times['median']:.3g} ({times['low']:.3g} to {times['high']:.3g})"


def timing_rows(result: dict) -> list[tuple[str, ...]]:
    """Case, part, ours in ms, achieved rate, then the speed-up over each baseline."""
    cases, rows = _measured(result), []
    for name, value in cases.items():
        for side in SIDES:
            if "ours" not in value.get(side, {}):
                continue
            others = (*BASELINES, *value.get("variants", ()))
            ratios = [
                f"{baseline} {speed(cases, name, side, baseline):.2f}×"
                for baseline in others
                if baseline in value[side]
            ]
            share = bandwidth_share(cases, name) if side == "forward" and "bytes" in value else None
            rate = "" if share is None else f"{100 * share:.0f} % of copy"
            if side == "forward" and value.get("flops"):
                rate += f", {value['flops'] / value['forward']['ours']['median'] / 1e9:.0f} TFLOP/s"
            rows.append((name, side, _milliseconds(value[side]["ours"]), rate.strip(", "), ", ".join(ratios)))
    return rows


def memory_rows(result: dict) -> list[tuple[str, ...]]:
    """Case, peak GB, weights GB, milliseconds of a training step."""
    return [
        (
            name,
            f"{value['peak'] / 1e9:.2f}",
            f"{value['weights'] / 1e9:.2f}" if "weights" in value else "",
            _milliseconds(value["step"]) if "step" in value else "",
        )
        for name, value in _measured(result).items()
        if "peak" in value
    ]


def problems(result: dict) -> list[str]:
    """Cases that failed, ran too long or were left out, and baselines that were not there."""
    lines = [f"{name}: {case['error']}" for name, case in result["cases"].items() if "error" in case]
    for name, value in _measured(result).items():
        lines += [f"{name}: without {baseline} ({why})" for baseline, why in value.get("unavailable", {}).items()]
    for name, case in result["cases"].items():
        if "value" in case and case.get("commit", result["commit"]) != result["commit"]:
            lines.append(f"{name}: measured at commit {case['commit']}")
    tests = result["cases"].get("GPU tests", {}).get("value", {})
    if isinstance(tests.get("failures"), dict):
        lines += [f"{test}: failed" for test in tests["failures"]]
    return lines


def headline(result: dict) -> str:
    gpu = result["gpu"]
    versions = ", ".join(f"{name} {version}" for name, version in gpu["versions"].items())
    return f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB; {versions}; commit {result['commit']}, {result['date']}."


def tables(result: dict) -> str:
    """Everything that was measured, as Markdown."""
    lines = [headline(result), ""]
    tests = result["cases"].get("GPU tests", {}).get("value")
    if tests:
        unknown = f", {tests['not_run']} not run for lack of time" if tests.get("not_run") else ""
        lines += [
            f"GPU tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped{unknown}.",
            "",
        ]
    lines += [*_table(("", "measured", "target", "result"), target_rows(result)), ""]
    if memory_rows(result):
        lines += [*_table(("", "peak, GB", "weights, GB", "step, ms"), memory_rows(result)), ""]
    if timing_rows(result):
        lines += [*_table(("", "", "ours, ms (range)", "rate", "times as fast as"), timing_rows(result)), ""]
    lines += [f"- {line}" for line in problems(result)]
    return "\n".join(lines).rstrip()


def chart(result: dict, file: Path) -> bool:
    """Speed-up over each baseline, forward and backward, as a chart. False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = _measured(result)
    parts = [
        (name, side)
        for name, value in cases.items()
        for side in SIDES
        if len(value.get(side, {})) > 1 and "ours" in value[side]
    ]
    figure, axis = pyplot.subplots(figsize=(11, 1.5 + 0.42 * max(1, len(parts))))
    baselines = [baseline for baseline in BASELINES if any(baseline in cases[name][side] for name, side in parts)]
    colours = dict(zip(BASELINES, pyplot.colormaps["tab10"].colors))
    for place, (name, side) in enumerate(reversed(parts)):
        for baseline in baselines:
            if baseline in cases[name][side]:
                axis.plot(speed(cases, name, side, baseline), place, "o", color=colours[baseline])
    for baseline in baselines:
        axis.plot([], [], "o", color=colours[baseline], label=baseline)
    axis.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(parts)), [f"{name}, {side}" for name, side in reversed(parts)])
    axis.set_xscale("log")
    axis.set_xlabel("times as fast as")
    axis.grid(axis="y", linewidth=0.3)
    if baselines:
        axis.legend(loc="lower right")
    axis.set_title(result["gpu"]["name"])
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return True


def _gpu_results(folder: Path) -> list[dict]:
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [result for result in results if "gpu" in result]


def markdown_section(folder: Path = RESULTS) -> str:
    """Tables of every GPU result, or that there is none, and the compile check's summary."""
    results, audit = _gpu_results(folder), folder / "audit.json"
    lines = ["`make bench-gpu` measured:", *map(tables, results)]
    if not results:
        lines = [
            "**GPU figures are not measured yet.** The kernels have run under Triton's interpreter only, against "
            "their references; `make bench-gpu` "
            "tests and measures them on a machine with a GPU and writes its table here."
        ]
    if audit.is_file():
        from bench.compile_check.report import summary_markdown

        lines += [
            "What a compiler can show has been checked (`make audit`, [all of it](../bench/results/audit.md)): every "
            "kernel at the model's real "
            "shapes, compiled for each architecture. " + summary_markdown(json.loads(audit.read_text()))
        ]
    return "\n\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("result", type=Path, help="a result file of make bench-gpu")
    arguments = parser.parse_args(argv)
    print(tables(json.loads(arguments.result.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
