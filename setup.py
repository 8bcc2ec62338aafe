"""Builds qvl_kernels._C, the C++17 CPU extension. It needs no torch headers: one build serves every torch version.

QVL_SANITIZE=1 builds it with AddressSanitizer and UBSan, for tests/sanitize.sh. QVL_TEST_TARGETS=1 adds targets that
are only for tests: matrix units emulated on every machine.
"""

import glob
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
except ImportError:
    sys.exit("qvl: building needs pybind11: pip install pybind11")

AMX, AMX_EMULATED = "csrc/cpu/targets/amx.cpp", "csrc/cpu/targets/amx_emulated.cpp"
X86_ONLY = (*(f"csrc/cpu/targets/{isa}.cpp" for isa in ("avx2", "avx512", "avx512_vnni", "avx512_bf16")), AMX)
AMX_PROBE = 'void probe() { asm("ldtilecfg (%rax); tdpbf16ps %tmm2, %tmm1, %tmm0; tdpbssd %tmm2, %tmm1, %tmm0"); }'
COMPILE = [
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
    "-fvisibility=hidden",
    # GCC 12 warns inside its own AVX-512 headers.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
LINK = ["-fopenmp"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
TEST_TARGETS = os.environ.get("QVL_TEST_TARGETS") == "1"
if os.environ.get("QVL_SANITIZE") == "1":
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    COMPILE += [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer"]
    LINK += SANITIZE


def sources() -> list[str]:
    found = sorted(
        glob.glob("csrc/bindings/*.cpp") + glob.glob("csrc/ops/*.cpp") + glob.glob("csrc/cpu/**/*.cpp", recursive=True)
    )
    if not IS_X86:
        found = [path for path in found if path not in X86_ONLY]
    return [path for path in found if path != AMX_EMULATED or TEST_TARGETS]


class BuildExtension(build_ext):
    def build_extensions(self) -> None:
        compiler = getattr(self.compiler, "compiler_cxx", None)
        if compiler and not shutil.which(compiler[0]):
            raise SystemExit(
                f"qvl: no C++ compiler found (looked for {compiler[0]!r}). "
                "Install one that knows C++17 and OpenMP, for example: apt-get install g++ (or set CXX)."
            )
        (extension,) = self.extensions
        if TEST_TARGETS:
            extension.define_macros.append(("QVL_TEST_TARGETS", None))
        if AMX in extension.sources:
            if self._assembles(AMX_PROBE):
                extension.define_macros.append(("QVL_HAS_AMX", None))
            else:
                extension.sources.remove(AMX)
                print("qvl: left out the kernels for AMX, whose instructions this assembler does not know")
        # For setuptools one that was built with, or without, targets for tests is up to date, also for a wheel.
        built = Path(self.get_ext_fullpath(extension.name))
        if built.exists() and (b"amx_emulated" in built.read_bytes()) != TEST_TARGETS:
            self.force = True
        super().build_extensions()

    def _assembles(self, code: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(code)
            try:
                self.compiler.compile([str(source)], output_dir=folder)
            except CompileError:
                return False
        return True


ParallelCompile("QVL_BUILD_JOBS", default=2).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "qvl_kernels._C",
            sources(),
            cxx_std=17,
            depends=glob.glob("csrc/**/*.h", recursive=True),
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
