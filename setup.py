"""Builds qvl_kernels._C, the C++17 CPU extension. It needs no torch headers: one build serves every torch version.

QVL_SANITIZE=1 builds it with AddressSanitizer and UBSan, for tests/sanitize.sh.
"""

import glob
import os
import platform
import shutil
import sys

from setuptools import setup

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
except ImportError:
    sys.exit("qvl: building needs pybind11: pip install pybind11")

X86_ONLY = tuple(f"csrc/cpu/targets/{isa}.cpp" for isa in ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"))
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
if os.environ.get("QVL_SANITIZE") == "1":
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    COMPILE += [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer"]
    LINK += SANITIZE


def sources() -> list[str]:
    found = sorted(
        glob.glob("csrc/bindings/*.cpp") + glob.glob("csrc/ops/*.cpp") + glob.glob("csrc/cpu/**/*.cpp", recursive=True)
    )
    if platform.machine().lower() in ("x86_64", "amd64"):
        return found
    return [path for path in found if path not in X86_ONLY]


class BuildExtension(build_ext):
    def build_extensions(self) -> None:
        compiler = getattr(self.compiler, "compiler_cxx", None)
        if compiler and not shutil.which(compiler[0]):
            raise SystemExit(
                f"qvl: no C++ compiler found (looked for {compiler[0]!r}). "
                "Install one that knows C++17 and OpenMP, for example: apt-get install g++ (or set CXX)."
            )
        super().build_extensions()


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
