"""python -m bench.compile_check: every Triton kernel at the model's real shapes, compiled for every architecture and
read back.

Needs no GPU. The kernels are those that the public ops launch on their shared cases with ``model=True``, forward and
backward; a kernel that none of these reaches is compiled for the first other case that does. Registers, stack, spills,
shared memory, resident warps and the matrix instructions inside loops go to bench/results/audit.json and audit.md. Exit
status 1 for a violation that is no known issue (bench/compile_check/known_issues.py), or for a known issue that no
longer occurs.
"""

import argparse
import json
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import qvl_kernels
import qvl_model
from bench import docs
from bench.compile_check import report
from bench.compile_check.chips import ROOFLINES
from bench.compile_check.compiled import compile_all, violations
from bench.compile_check.known_issues import KNOWN_ISSUES, KnownIssue
from bench.compile_check.launches import (
    GRADIENTS_WITH_LOSS,
    Call,
    Specialisation,
    kernels,
    record,
    record_training,
    specialise,
)
from bench.compile_check.sources import Source, sources
from bench.session import DTYPES
from qvl_kernels import config
from qvl_kernels.gpu.device import ARCHITECTURES
from qvl_kernels.testing import Case

__all__ = ["CompileCheck", "compile_check", "main"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
# bf16 is what models run in; the others differ in tile sizes and instructions, so one architecture shows them.
PLAN = [("sm_90", "fp16"), ("sm_80", "fp32")] + [(arch, "bf16") for arch in ARCHITECTURES]
# FLOPs of a backward pass, as a multiple of the forward's: two matmuls for each of the forward's, and the scores or
# logits recomputed.
BACKWARD_FLOPS = {"attention": 2.5, "cross_attention": 2.5, "linear_cross_entropy": 3.0}


@dataclass
class _Kernel:
    """One specialisation, the dtype of its first case, and all cases that use it."""

    specialisation: Specialisation
    dtype: str
    cases: list[str]


@dataclass
class CompileCheck:
    """Result of the compile check; ``rows`` is what audit.json holds, ``failures`` what makes it fail."""

    rows: list[dict] = field(default_factory=list)
    work: list[dict] = field(default_factory=list)
    known_issues: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def _work(op: str, case: Case, backward: list[Call], training: list[Call]) -> list[dict]:
    """FLOPs, bytes and roofline times of a case in bf16; the backward's bytes are its ops' inputs and outputs.
    Training: a forward that computes the gradients too.
    """
    sides = [("forward", case.flops, case.bytes(2))]
    if backward:
        sides.append(
            ("backward", case.flops * BACKWARD_FLOPS.get(op, 2.0), float(sum(call.bytes for call in backward)))
        )
    if training:
        sides.append(("training", case.flops * 3.0, float(sum(call.bytes for call in training))))
    return [
        {
            "op": op,
            "case": case.name,
            "direction": direction,
            "flops": flops,
            "bytes": bytes,
            "microseconds": {name: round(1e6 * chip.seconds(flops, bytes), 2) for name, chip in ROOFLINES.items()},
        }
        for direction, flops, bytes in sides
    ]


class _Collector:
    """Gathers specialisations over ops, cases, dtypes and architectures, each once."""

    def __init__(self, result: CompileCheck) -> None:
        self.result = result
        self.found: dict[str, _Kernel] = {}
        self.reached: set[tuple[str, str]] = set()  # (architecture, kernel)
        self._worked: set[tuple[str, str]] = set()

    def add(self, op: str, source: Source, case: Case, arch: str, dtype: str, wanted: set[str] | None = None) -> None:
        """Records a case; of a case that is no model shape only the kernels in ``wanted``."""
        try:
            forward, backward = record(source.function, case, DTYPES[dtype], arch)
            training = record_training(source.function, case, DTYPES[dtype], arch) if op in GRADIENTS_WITH_LOSS else []
            launches = [
                (direction, launch)
                for direction, calls in (("forward", forward), ("backward", backward), ("training", training))
                for call in calls
                for launch in call.launches
                if not source.variants or any(launch.arguments.get(name) for name in source.variants)
            ]
            made = [(direction, specialise(launch, arch)) for direction, launch in launches]
        except Exception as error:  # the check must report a launcher that cannot run on this architecture
            if wanted is None:
                self.result.failures.append(
                    f"{op} {case.name}, {arch}, {dtype}: cannot be launched: {type(error).__name__}: {error}"
                )
            return
        if case.model and made and not source.variants and (op, case.name) not in self._worked:
            self._worked.add((op, case.name))
            self.result.work += _work(op, case, backward, training)
        for direction, specialisation in made:
            name = _name(specialisation)
            if wanted is not None and name not in wanted:
                continue
            self.reached.add((arch, name))
            kernel = self.found.setdefault(specialisation.key, _Kernel(specialisation, dtype, []))
            label = f"{op} {case.name} {direction}"
            if label not in kernel.cases:
                kernel.cases.append(label)


def _name(specialisation: Specialisation) -> str:
    return f"{specialisation.kernel.__module__}:{specialisation.kernel.__name__}"


def _collect(result: CompileCheck, names: list[str] | None, plan: list[tuple[str, str]]) -> list[_Kernel]:
    collector, known = _Collector(result), kernels(qvl_kernels, qvl_model)
    cases = [
        (name, source, case)
        for name, source in sources().items()
        if names is None or name in names
        for case in source.cases
    ]
    for arch, dtype in plan:
        for op, source, case in cases:
            if case.model:
                collector.add(op, source, case, arch, dtype)
    unreached: dict[str, list[str]] = {}
    for arch, dtype in dict(plan).items():
        for other in (dtype, "fp16"):  # some kernels run in fp16 only, for its short range
            for op, source, case in cases:
                missing = {name for name in known if (arch, name) not in collector.reached}
                if missing and (not case.model or other != dtype):
                    collector.add(op, source, case, arch, other, missing)
        for name in known:
            if (arch, name) not in collector.reached:
                unreached.setdefault(name, []).append(arch)
    if names is None:
        result.failures += [
            f"{name.split(':')[1]}: no case of any op launches it on {', '.join(archs)}, so nothing is known about it"
            for name, archs in sorted(unreached.items())
        ]
    return list(collector.found.values())


def _row(kernel: _Kernel, found: dict) -> dict:
    specialisation = kernel.specialisation
    names, constants = specialisation.kernel.arg_names, {}
    for place, value in specialisation.source.constants.items():
        if hasattr(value, "_asdict"):  # constants in a named tuple
            constants |= {name: str(constant) for name, constant in value._asdict().items()}
        elif names[place[0]].isupper():
            constants[names[place[0]]] = str(value)
    return {
        "kernel": specialisation.kernel.__name__,
        "arch": specialisation.arch,
        "dtype": kernel.dtype,
        "cases": kernel.cases,
        "constants": constants,
        **found,
    }


def _judge(result: CompileCheck, row: dict, known_issues: list[KnownIssue], used: set[KnownIssue]) -> None:
    """Adds a row with its violations, known issues included."""
    wrong = [("compile", row["error"])] if "error" in row else violations(row["arch"], row)
    row["violations"] = []
    for kind, sentence in wrong:
        text = f"{row['kernel']}, {row['arch']}, {row['dtype']} ({row['cases'][0]}): {sentence}"
        issue = next(
            (
                issue
                for issue in known_issues
                if issue.covers(row["kernel"], row["arch"], row["dtype"], kind, triton.__version__)
            ),
            None,
        )
        row["violations"].append({"kind": kind, "text": sentence, "known_issue": issue.reason if issue else None})
        if issue is None:
            result.failures.append(text)
        else:
            used.add(issue)
            result.known_issues.append(f"{text}: {issue.reason}")
    result.rows.append(row)


def compile_check(
    *,
    names: list[str] | None = None,
    plan: list[tuple[str, str]] = PLAN,
    known_issues: list[KnownIssue] = KNOWN_ISSUES,
    jobs: int = 2,
    console: Console | None = None,
) -> CompileCheck:
    """Compiles and judges the kernels of ops ``names`` (default all) for ``plan``, pairs of architecture and dtype.

    Example:
        >>> compile_check(names=["swiglu"], plan=[("sm_90", "bf16")]).failures
        []
    """
    if config.interpreted():
        raise RuntimeError("compile check: TRITON_INTERPRET=1 is set, so there is nothing to compile; unset it")
    result = CompileCheck()
    console = console or Console(quiet=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Refreshed by hand: processes are forked meanwhile, and forking beside a refreshing thread is not safe.
    with Progress(*columns, console=console, auto_refresh=False) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bar = progress.add_task("recording launches", total=None)
        progress.refresh()
        found = _collect(result, names, plan)
        by_key = {kernel.specialisation.key: kernel for kernel in found}
        progress.update(bar, description=f"compiling, {jobs} at a time", total=len(found))
        used: set[KnownIssue] = set()
        for specialisation, inspected in compile_all(
            [k.specialisation for k in found], jobs=jobs, tick=progress.refresh
        ):
            _judge(result, _row(by_key[specialisation.key], inspected), known_issues, used)
            progress.advance(bar)
        progress.refresh()
    result.rows.sort(key=lambda row: (row["kernel"], row["dtype"], row["arch"], row["cases"]))
    if names is None and {arch for arch, _ in plan} == set(ARCHITECTURES):
        result.failures += [
            f"unused known issue: {issue.kernel}, {issue.arch}, {issue.dtype}, {issue.kind} ({issue.reason})"
            for issue in known_issues
            if issue not in used and triton.__version__.startswith(issue.triton)
        ]
    return result


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_check", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--op", action="append", choices=list(sources()), help="only this op (may be repeated); writes no files"
    )
    parser.add_argument(
        "--arch",
        action="append",
        choices=ARCHITECTURES,
        help="only this architecture (may be repeated); writes no files",
    )
    parser.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="only this dtype (may be repeated); writes no files"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilations at a time (default: one per core)"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of audit.json and audit.md (default bench/results)"
    )
    parser.add_argument("--no-write", action="store_true", help="only print")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: clean, 1: violations, 2: nothing to do."""
    arguments = _arguments(argv)
    plan = [
        (arch, dtype)
        for arch, dtype in PLAN
        if (not arguments.arch or arch in arguments.arch) and (not arguments.dtype or dtype in arguments.dtype)
    ]
    if not plan:
        print(
            "bench.compile_check: that dtype is not compiled for that architecture: see PLAN in its __main__.py",
            file=sys.stderr,
        )
        return 2
    cache = config.cache_folder() / f"audit-triton-{triton.__version__}"
    os.environ["TRITON_CACHE_DIR"] = str(cache)  # apart from the user's Triton cache
    console = Console(width=None if sys.stdout.isatty() else 160)
    result = compile_check(names=arguments.op, plan=plan, jobs=max(1, arguments.jobs), console=console)
    report.print_tables(result, console)
    partial = arguments.op or arguments.arch or arguments.dtype
    if not partial and not arguments.no_write:
        data = report.data(result, {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]})
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "audit.json").write_text(json.dumps(data, indent=1) + "\n")
        (arguments.output / "audit.md").write_text(report.markdown(data))
        console.print(f"written: {arguments.output / 'audit.json'} and audit.md", highlight=False)
        if arguments.output == RESULTS:
            docs.write()
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
