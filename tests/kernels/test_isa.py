"""Every instruction set of this machine, each forced in its own process, since QVL_CPU_ISA is read once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qvl_kernels

ROOT = Path(__file__).resolve().parents[2]
# The best one runs in the other tests.
FORCED = [isa for isa in qvl_kernels.cpu_info()["supported"] if isa != qvl_kernels.cpu_info()["isa"]]


def _python(*arguments: str, isa: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "QVL_CPU_ISA": isa}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def _run_tests(isa: str, *arguments: str) -> None:
    result = _python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments, isa=isa)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.parametrize("isa", FORCED)
def test_small_cases(isa):
    _run_tests(isa, "tests/kernels/test_ops.py", "-k", "test_forward")


@pytest.mark.parametrize("isa", FORCED)
def test_quantised_products(isa):
    _run_tests(isa, "tests/kernels/test_quant_gemm.py", "tests/kernels/test_quantized_linear.py")


@pytest.mark.parametrize("isa", [isa for isa in FORCED if isa != "amx_emulated"])
def test_peaks_of_units(isa):
    _run_tests(isa, "tests/kernels/test_unit_peaks.py")


@pytest.mark.slow
@pytest.mark.parametrize("isa", FORCED)
def test_model_sizes(isa):
    _run_tests(isa, "tests/kernels/test_ops.py", "-k", "test_model_sizes")


PRINT_ISA = "import qvl_kernels; print(qvl_kernels.cpu_info()['isa'])"


@pytest.mark.parametrize("isa", FORCED)
def test_forced_isa_is_used(isa):
    assert _python("-c", PRINT_ISA, isa=isa).stdout.strip() == isa


def test_unknown_isa_lists_the_valid_ones():
    result = _python("-c", PRINT_ISA, isa="sse9")
    assert result.returncode != 0
    supported = ", ".join(qvl_kernels.cpu_info()["supported"])
    assert f"QVL_CPU_ISA=sse9 is not an instruction set; supported here: {supported}" in result.stderr
