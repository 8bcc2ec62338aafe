"""Every instruction set that this machine has, each forced in a process of its own: QVL_CPU_ISA is read once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_ops import DTYPES, OPS, SMALL

import qvl_kernels

ROOT = Path(__file__).resolve().parent.parent
# The best one runs in the other tests.
FORCED = [isa for isa in qvl_kernels.cpu_info()["supported"] if isa != qvl_kernels.cpu_info()["isa"]]


def _run(isa: str, tests: list[str], tmp_path: Path) -> subprocess.CompletedProcess:
    """pytest over ``tests`` with ``isa`` forced; the list goes through a file, since it is long."""
    arguments = tmp_path / "tests.txt"
    arguments.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"@{arguments}"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "QVL_CPU_ISA": isa}, capture_output=True, text=True)


@pytest.mark.parametrize("isa", FORCED)
def test_small_cases(isa, tmp_path):
    tests = [f"tests/test_ops.py::test_forward[{case.id}-{dtype}]" for case in SMALL for dtype in DTYPES]
    result = _run(isa, tests, tmp_path)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("isa", FORCED)
def test_model_shapes(isa, tmp_path):
    tests = [f"tests/test_ops.py::test_forward[{op}-{case.name}-{dtype}]" for op, (_, cases) in OPS.items() for case in cases
             if case.model for dtype in DTYPES]
    result = _run(isa, tests, tmp_path)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def _isa_of(environment: dict[str, str]) -> subprocess.CompletedProcess:
    code = "import qvl_kernels; print(qvl_kernels.cpu_info()['isa'])"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("isa", FORCED)
def test_forced_isa_is_used(isa):
    assert _isa_of({"QVL_CPU_ISA": isa}).stdout.strip() == isa


def test_unknown_isa_lists_the_valid_ones():
    result = _isa_of({"QVL_CPU_ISA": "sse9"})
    assert result.returncode != 0
    assert "sse9" in result.stderr and "portable" in result.stderr
