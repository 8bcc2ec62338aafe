"""Writes the generated parts of README.md and docs/, most from the files in bench/results: ``python -m bench.docs``.

Each part is between two markers, ``<!-- generated NAME: begin -->`` and the same with ``end``.
"""

import json
from collections.abc import Callable
from pathlib import Path

from bench import report, timing
from bench.gpu import report as gpu_report
from bench.gpu.targets import speed
from qvl_model.quantization.precision import BUDGET

__all__ = ["CHART", "SECTIONS", "chart_numbers", "draw_chart", "markers", "replace_section", "section", "write"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CHART = RESULTS / "overview.png"
# The result files that the pages show.
CPU, AMX_CPU, OLDER_CPU, QVL, GPU = "zen5", "xeon-amx", "zen4", "zen5-qvl", "nvidia-h100-80gb-hbm3"
OUTLIERS = "outliers"  # bench/outliers.py
ONE_LOOP = "one-loop"  # bench/compare.py against the commit before the one loop of generate


def markers(name: str) -> tuple[str, str]:
    """The lines around a generated part."""
    return f"<!-- generated {name}: begin -->", f"<!-- generated {name}: end -->"


def section(text: str, name: str) -> str:
    """The text between the markers of ``name``.

    Raises: ValueError unless both stand in ``text`` once.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{begin!r} and {end!r} must stand in the page once each")
    return text.split(begin)[1].split(end)[0].strip()


def replace_section(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of ``name``.

    Raises: as ``section``.
    """
    section(text, name)
    begin, end = markers(name)
    return f"{text.split(begin)[0]}{begin}\n{content}\n{end}{text.split(end)[1]}"


def _load(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def _gpu_cases(folder: Path) -> dict[str, dict]:
    return {name: case["value"] for name, case in _load(folder, GPU)["cases"].items() if "value" in case}


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ("---",) * len(header), *rows])


def front(folder: Path) -> str:
    """The table of README.md: decode, first token and memory, each with its ratio to stock, and one caveat a row; of
    the CPU a column for each type of machine.
    """
    result, amx, gpu, cases = _load(folder, CPU), _load(folder, AMX_CPU), _load(folder, GPU), _gpu_cases(folder)
    metrics, precisions = result["metrics"], result["accuracy"]["precisions"]

    def cell(key: str, of: dict = result) -> str:
        return f"{of['metrics'][key]['ours']}, {of['metrics'][key]['value']:.2f}×"

    def cpu(suffix: str) -> tuple[str, ...]:
        decode, first = f"decode{suffix}", f"ttft{suffix}"
        return cell(decode), cell(first), cell(decode, amx), cell(first, amx), cell(f"peak_rss{suffix}")

    def error(suffix: str) -> str:
        return f"{metrics[f'error_bf16_full{suffix}']['value']:.1f}× stock's error"

    def exact(name: str) -> str:
        return f"{100 * precisions[name]['exact_ours']:.1f} % (stock {100 * precisions[name]['exact_stock']:.1f} %)"

    def peak(name: str) -> str:
        ratio = cases[f"memory {name}"]["peak"] / cases["memory stock"]["peak"]
        return f"{cases[f'memory {name}']['peak'] / 1e9:.2f} GB, {ratio:.2f}×"

    read = result["raw"]["bytes_per_token"]
    bits = 16 * read["int4"] / read["ours"]
    generated = cases["generate"]
    decode, first = (
        f"{1000 / generated['decode']['ours']['median']:.0f} tok/s, {speed(cases, 'generate', 'decode', 'stock'):.2f}×",
        f"{generated['first']['ours']['median']:.1f} ms, {speed(cases, 'generate', 'first', 'stock'):.2f}×",
    )
    no_amx, slow_first = ("", ""), "the first token is slower than stock's: bound by the host"
    rows = [
        ("CPU, bf16", *cpu(""), "prompts are near the processor's bf16 ceiling"),
        (
            "CPU, int8",
            *cpu("_int8"),
            f"activations are int8 too: {error('_int8')}; digits model {exact('int8')} exact",
        ),
        (
            "CPU, int4",
            *cpu("_int4"),
            f"without AMX {bits:.1f} bits a weight (the default, with AMX, is {BUDGET}); "
            f"{error('_int4')} on random weights; digits model {exact('int4')} exact",
        ),
        (
            "CPU, bf16, held to AVX2",
            cell("avx2_decode_bf16"),
            cell("avx2_ttft_bf16"),
            *no_amx,
            "not measured",
            f"stock's bf16 is slow there; against its fp32 {metrics['avx2_ttft_fp32']['value']:.2f}× (first token)",
        ),
        ("H100, bf16", decode, first, *no_amx, peak("accelerated"), slow_first),
        ("H100, int8", *2 * ("not measured",), *no_amx, peak("int8"), "the one run ended before speed was measured"),
    ]
    machine, sizes = result["machine"], result["sizes"]
    notes = (
        f"Ratios are to stock transformers: speed (more is better), memory (less is better). CPU: {machine['cores']} "
        f"cores of an {machine['cpu']} (Zen 5), {result['date']}; with AMX: {amx['machine']['cores']} cores of an "
        f"Intel Xeon (a shared machine), {amx['date']}; GPU: {gpu['gpu']['name']}, {gpu['date']}. Random "
        f"weights in the published sizes, one image of {result['options']['image_size']} × "
        f"{result['options']['image_size']} pixels and {sizes['text_tokens']} tokens of text, one row."
    )
    header = ("", "decode", "first token", "decode, CPU with AMX", "first token, CPU with AMX", "peak memory", "caveat")
    return "\n".join([_table(header, rows), "", notes])


def chart_numbers(folder: Path = RESULTS) -> dict[str, dict[str, float]]:
    """Numbers of the chart of README.md: speed-up over stock, by configuration, of decode and first token."""
    metrics, cases = _load(folder, CPU)["metrics"], _gpu_cases(folder)
    numbers = {
        f"CPU, {name}": {
            "decode": round(metrics[f"decode{suffix}"]["value"], 2),
            "first token": round(metrics[f"ttft{suffix}"]["value"], 2),
        }
        for name, suffix in (("bf16", ""), ("int8", "_int8"), ("int4", "_int4"))
    }
    numbers["H100, bf16"] = {
        "decode": round(speed(cases, "generate", "decode", "stock"), 2),
        "first token": round(speed(cases, "generate", "first", "stock"), 2),
    }
    return numbers


def draw_chart(file: Path, folder: Path = RESULTS) -> None:
    """Writes the chart of README.md. Its numbers are stored in the file too, so that tests can compare them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = chart_numbers(folder)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 2.6), sharey=True)
    for axis, (part, colour) in zip(axes, (("decode", "#3a7d44"), ("first token", "#2f6690"))):
        values = [numbers[name][part] for name in reversed(numbers)]
        axis.barh(range(len(values)), values, color=colour, height=0.6)
        for place, value in enumerate(values):
            axis.annotate(f"{value:.2f}×", (value, place), xytext=(4, 0), textcoords="offset points", va="center")
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_yticks(range(len(values)), list(reversed(numbers)))
        axis.set_title(f"{part}, times as fast as stock", fontsize=10)
        axis.margins(x=0.15)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=120, metadata={"Description": json.dumps(numbers)})
    pyplot.close(figure)


def outliers(folder: Path) -> str:
    """Trained models with outlier channels, quantised with and without calibration."""
    result = _load(folder, OUTLIERS)
    rows = [
        (f"{name}, {weights}, {label}", f"{kl:.1e} ± {error:.0e}", f"{exact:.2%}", f"{dense:.2%}")
        for name, weights, label, kl, error, exact, dense in result["rows"]
    ]
    return _table((f"{result['questions']} questions", "KL from dense", "exact", "dense exact"), rows)


def accuracy(folder: Path) -> str:
    """Errors of both families by weight format, then the answers of the trained models."""
    errors, answers = [], []
    for name, title in ((CPU, "Qwen3-VL-2B"), (QVL, "qvl-2b")):
        metrics = _load(folder, name)["metrics"]
        for key, what in (
            ("error_bf16_full", "bf16, all layers, against fp32"),
            ("error_bf16_full_int8", "int8, all layers, against fp32"),
            ("error_bf16_full_int4", "int4, all layers, against fp32"),
            ("error_bf16_float64", "bf16, 4 layers, against float64"),
            ("error_fp32_float64", "fp32, 4 layers, against float64"),
        ):
            if key in metrics:
                errors.append(
                    (
                        f"{title}, {what}",
                        metrics[key]["stock"],
                        metrics[key]["ours"],
                        f"{metrics[key]['value']:.3f}×",
                    )
                )
    for name in (CPU, QVL):
        suite = _load(folder, name)["accuracy"]
        for precision, value in suite["precisions"].items():
            answers.append(
                (
                    f"{suite['model']}, {precision}",
                    f"{100 * value['exact_stock']:.2f} %",
                    f"{100 * value['exact_ours']:.2f} %",
                    f"{100 * value['agreement']:.2f} %",
                    f"{value['perplexity_ratio']:.5f}×",
                )
            )
    return "\n".join(
        [
            _table(("relative L2 error of the logits", "stock", "accelerated", "ratio"), errors),
            "",
            _table(
                ("model and weights", "stock exact", "accelerated exact", "answer agreement", "perplexity ratio"),
                answers,
            ),
        ]
    )


def training_keys(folder: Path) -> str:
    """What `qvl train --keys` prints."""
    from qvl_model.training import describe_keys

    return f"```yaml\n{describe_keys().rstrip()}\n```"


def _cpu_table(name: str) -> Callable[[Path], str]:
    return lambda folder: report.markdown_table(_load(folder, name))


def checkouts(folder: Path) -> str:
    """What bench/compare.py found: tokens per second of two checkouts, medians, and the range of the pairs' ratios."""
    result = _load(folder, ONE_LOOP)
    names = {"generate": "`generate`", "loop": "a loop of one's own", "prompt": "a prompt"}
    rows = []
    for row in result["rows"]:
        ratios = [this / that for that, this in row["pairs"]]
        that, this = (timing.median([pair[side] for pair in row["pairs"]]) for side in (0, 1))
        speeds = (f"{that:.2f}", f"{this:.2f}", f"{row['median']:.3f}", f"{min(ratios):.2f} to {max(ratios):.2f}")
        rows.append((row["weights"], names[row["kind"]], str(row["rows"]), *speeds))
    machine = result["machine"]
    header = ("weights", "call", "rows", f"{result['other']}, tok/s", "then, tok/s", "ratio", "range of the pairs")
    about = f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['cpu_flags'])}; commit {machine['commit']}"
    return f"{_table(header, rows)}\n\n{len(result['rows'][0]['pairs'])} interleaved pairs; {about}."


SECTIONS: dict[tuple[str, str], Callable[[Path], str]] = {
    ("README.md", "front"): front,
    ("docs/benchmarks.md", "cpu"): _cpu_table(CPU),
    ("docs/benchmarks.md", "amx cpu"): _cpu_table(AMX_CPU),
    ("docs/benchmarks.md", "older cpu"): _cpu_table(OLDER_CPU),
    ("docs/benchmarks.md", "qvl"): _cpu_table(QVL),
    ("docs/benchmarks.md", "gpu"): gpu_report.markdown_section,
    ("docs/performance-notes.md", "one loop"): checkouts,
    ("docs/accuracy.md", "accuracy"): accuracy,
    ("docs/accuracy.md", "outliers"): outliers,
    ("docs/training.md", "keys"): training_keys,
}


def write(root: Path = ROOT, folder: Path = RESULTS) -> None:
    """Writes every generated part of the pages below ``root``.

    Raises: ValueError for a page without the markers.
    """
    for (page, name), content in SECTIONS.items():
        file = root / page
        file.write_text(replace_section(file.read_text(), name, content(folder)))


def main() -> None:
    write()
    draw_chart(CHART)


if __name__ == "__main__":
    main()
