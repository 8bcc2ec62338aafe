"""Every instruction set of this machine, each forced in its own process, since QVL_CPU_ISA is read once."""

import os
import platform
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


# Products and attention alone where matrix units are emulated: all of it takes half an hour.
EMULATED = "test_model_sizes and bfloat16 and (linear-prefill or quantized_linear or attention-vision)"


@pytest.mark.slow
@pytest.mark.parametrize("isa", FORCED)
def test_model_sizes(isa):
    chosen = EMULATED if isa == "amx_emulated" else "test_model_sizes"
    _run_tests(isa, "tests/kernels/test_ops.py", "-k", chosen)


PRINT_ISA = "import qvl_kernels; print(qvl_kernels.cpu_info()['isa'])"


@pytest.mark.parametrize("isa", FORCED)
def test_forced_isa_is_used(isa):
    assert _python("-c", PRINT_ISA, isa=isa).stdout.strip() == isa


def test_unknown_isa_lists_the_valid_ones():
    result = _python("-c", PRINT_ISA, isa="sse9")
    assert result.returncode != 0
    supported = ", ".join(qvl_kernels.cpu_info()["supported"])
    assert f"QVL_CPU_ISA=sse9 is not an instruction set; supported here: {supported}" in result.stderr


# arch_prctl(ARCH_REQ_XCOMP_PERM, ...) fails with EPERM in this process, as a container's seccomp filter may have it.
REFUSE_TILES = """
import ctypes, struct
filters = [
    (0x20, 0, 0, 0), (0x15, 0, 3, 158),  # the number of the call, arch_prctl
    (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023),  # its first argument
    (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000),  # EPERM, and all else
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in filters))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(filters), ctypes.addressof(code)))
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, a filter
"""
CHOSEN = """
import torch, qvl_kernels
x, w = torch.randn(70, 96).bfloat16(), torch.randn(40, 96).bfloat16()
exact = x.double() @ w.double().T
assert ((qvl_kernels.linear(x, w).double() - exact).norm() / exact.norm()) < 4e-3
print(qvl_kernels.cpu_info()["isa"])
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="a filter of Linux on x86-64")
def test_refused_matrix_units():
    """The next lower instruction set is chosen, silently; asked for by name, it is an error."""
    chosen = _python("-c", REFUSE_TILES + CHOSEN, isa="")
    lower = [isa for isa in qvl_kernels.cpu_info()["supported"] if not isa.startswith("amx")]
    assert (chosen.stdout.split(), chosen.stderr) == ([lower[-1]], "")
    forced = _python("-c", REFUSE_TILES + CHOSEN, isa="amx")
    assert forced.returncode != 0 and "QVL_CPU_ISA=amx: this processor does not support it" in forced.stderr
