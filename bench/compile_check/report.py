"""Report of the compile check: tables on the terminal, audit.md, and the summary for the documentation (see
bench/docs.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bench.compile_check.chips import LIMITS, ROOFLINES
from qvl_kernels.gpu.device import ARCHITECTURES, SHARED_MEMORY

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["data", "markdown", "print_tables", "summary", "summary_markdown"]

SUMMARY_HEADER = (
    "",
    "dtype",
    "compiled",
    "spills",
    "most registers",
    "most shared memory",
    "fewest resident warps",
    "matrix instructions",
    "violations",
    "known issues",
)


def data(result: Any, versions: dict[str, str]) -> dict:
    """What audit.json holds."""
    return {
        "versions": versions,
        "rows": result.rows,
        "work": result.work,
        "failures": result.failures,
        "known_issues": result.known_issues,
    }


def _matrix(row: dict) -> str:
    """ "HGMMA 12": matrix instructions inside loops, or "(HMMA 4)" where none is in a loop."""
    inside = [f"{name} {count}" for name, count in sorted(row["matrix_in_loops"].items())]
    outside = [
        f"({name} {count})" for name, count in sorted(row["matrix"].items()) if name not in row["matrix_in_loops"]
    ]
    return ", ".join(inside + outside)


def _spills(row: dict) -> int:
    return sum(row.get(name) or 0 for name in ("stack", "local_loads", "local_stores", "vgpr_spills", "sgpr_spills"))


def _cell(row: dict) -> str:
    """ "64 r, 48 KB, 32 w, HGMMA 12", with what is wrong."""
    if "error" in row:
        return "**does not compile**"
    parts = [f"{row['registers']} r", f"{row['shared'] / 1024:.3g} KB", f"{row['resident_warps']} w", _matrix(row)]
    wrong = [f"**{v['text']}{' (known issue)' if v['known_issue'] else ''}**" for v in row["violations"]]
    return ", ".join(part for part in [*parts, *wrong] if part)


def summary(rows: list[dict]) -> Iterator[tuple[str, ...]]:
    """One line of SUMMARY_HEADER per architecture and dtype."""
    pairs = {(row["arch"], row["dtype"]) for row in rows}
    for arch, dtype in sorted(pairs, key=lambda pair: (ARCHITECTURES.index(pair[0]), pair[1])):
        mine = [row for row in rows if (row["arch"], row["dtype"]) == (arch, dtype)]
        good = [row for row in mine if "error" not in row]
        wrong = [v for row in mine for v in row["violations"]]
        families = sorted({name for row in good for name in row["matrix_in_loops"]})
        shared = max((row["shared"] for row in good), default=0)
        yield (
            arch,
            dtype,
            str(len(mine)),
            str(sum(bool(_spills(row)) for row in good)),
            str(max((row["registers"] for row in good), default=0)),
            f"{shared / 1024:.3g} of {SHARED_MEMORY[arch] >> 10} KB",
            f"{min((row['resident_warps'] for row in good), default=0)} of {LIMITS[arch].warps}",
            ", ".join(families),
            str(sum(v["known_issue"] is None for v in wrong)),
            str(sum(v["known_issue"] is not None for v in wrong)),
        )


def print_tables(result: Any, console: "Console") -> None:
    """Summary, the worst of each kernel on each architecture, then every failure and every known issue."""
    from rich.markup import escape
    from rich.table import Table

    archs = [arch for arch in ARCHITECTURES if any(row["arch"] == arch for row in result.rows)]
    table = Table(
        "kernel",
        "dtype",
        *archs,
        title="registers, KB of shared memory, resident warps, matrix instructions in loops: the worst case each",
    )
    for kernel, dtype in sorted({(row["kernel"], row["dtype"]) for row in result.rows}):
        cells = []
        for arch in archs:
            mine = [row for row in result.rows if (row["kernel"], row["arch"], row["dtype"]) == (kernel, arch, dtype)]
            good = [row for row in mine if "error" not in row]
            if not mine:
                cells.append("")
            elif len(good) < len(mine):
                cells.append("[red]does not compile[/]")
            else:
                text = (
                    f"{max(r['registers'] for r in mine)}r {max(r['shared'] for r in mine) / 1024:.0f}K "
                    f"{min(r['resident_warps'] for r in mine)}w "
                    f"{' '.join(sorted({name for r in mine for name in r['matrix_in_loops']}))}"
                )
                failed = any(v["known_issue"] is None for row in mine for v in row["violations"])
                cells.append(f"[red]{text}[/]" if failed else text)
        table.add_row(escape(kernel), dtype, *cells)
    console.print(table)
    totals = Table(*SUMMARY_HEADER)
    for line in summary(result.rows):
        totals.add_row(*line)
    console.print(totals)
    for text in result.known_issues:
        console.print(f"known issue: {escape(text)}", style="yellow", highlight=False)
    for text in result.failures:
        console.print(f"violation: {escape(text)}", style="red", highlight=False)
    if not result.failures:
        console.print(f"{len(result.rows)} compilations, nothing is wrong", style="green", highlight=False)


def _table(header: tuple[str, ...], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def summary_markdown(data: dict) -> str:
    """The summary table with one line above it."""
    rows = data["rows"]
    kernels = len({row["kernel"] for row in rows})
    line = (
        f"{kernels} kernels, {len(rows)} compilations with Triton {data['versions']['triton']}, "
        f"{len(data['failures'])} violations, {len(data['known_issues'])} known issues."
    )
    return "\n".join([line, "", *_table(SUMMARY_HEADER, summary(rows))]).rstrip()


def markdown(data: dict) -> str:
    """The whole of audit.md."""
    lines = [
        "# Compile check of the Triton kernels",
        "",
        "Written by `python -m bench.compile_check`; do not edit.",
        "",
        summary_markdown(data),
        "",
    ]
    if data["failures"]:
        lines += ["## Violations", "", *(f"- {text}" for text in data["failures"]), ""]
    if data["known_issues"]:
        lines += ["## Known issues", "", *(f"- {text}" for text in data["known_issues"]), ""]
    lines += [
        "## Work and rooflines",
        "",
        "16-bit data. Forward FLOPs and bytes as the case counts them; a backward's bytes are its ops' inputs and "
        "outputs. "
        "The roofline is the longer of computing at the peak of dense 16-bit matrix arithmetic and moving at the "
        "peak of memory, in µs.",
        "",
    ]
    lines += _table(
        ("op", "case", "", "GFLOP", "MB", *(f"{name}, µs" for name in ROOFLINES)),
        (
            (
                w["op"],
                w["case"],
                w["direction"],
                f"{w['flops'] / 1e9:.4g}",
                f"{w['bytes'] / 1e6:.4g}",
                *(f"{time:g}" for time in w["microseconds"].values()),
            )
            for w in data["work"]
        ),
    )
    lines += [
        "## Kernels",
        "",
        "r: registers of a thread; KB: shared memory of a block; w: warps resident on a multiprocessor; then the "
        "matrix instructions inside loops "
        "(in parentheses: outside).",
        "",
    ]
    for kernel in sorted({row["kernel"] for row in data["rows"]}):
        mine = [row for row in data["rows"] if row["kernel"] == kernel]
        archs = [arch for arch in ARCHITECTURES if any(row["arch"] == arch for row in mine)]
        keys = dict.fromkeys((row["dtype"], case) for row in mine for case in row["cases"])
        lines += [f"### `{kernel}`", ""]
        lines += _table(
            ("case", "dtype", *archs),
            (
                (
                    case,
                    dtype,
                    *(
                        "<br>".join(
                            _cell(row)
                            for row in mine
                            if row["arch"] == arch and row["dtype"] == dtype and case in row["cases"]
                        )
                        for arch in archs
                    ),
                )
                for dtype, case in sorted(keys)
            ),
        )
    return "\n".join(lines)
