"""llama.cpp and ik_llama.cpp, built from the source distributions of their Python bindings."""

import os
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.client import Worker
from bench.engines.checkpoints import models_directory
from bench.engines.environment import (
    EngineUnavailable,
    Environment,
    Show,
    engines_directory,
    finished,
    is_complete,
    mark_complete,
    run_step,
    tried_once,
)

__all__ = ["IK_LLAMA_CPP", "LLAMA_CPP", "LlamaEngine", "Toolchain"]

CMAKE = (
    "-G",
    "Ninja",
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
)
TOOLS = ("llama-bench", "llama-quantize")
# ik_llama.cpp's distribution leaves out the script that its build runs to note number and commit.
BUILD_INFO = Path("common/cmake/build-info-gen-cpp.cmake")
BUILD_INFO_SCRIPT = """set(BUILD_NUMBER 0)
set(BUILD_COMMIT unknown)
configure_file("${CMAKE_CURRENT_LIST_DIR}/../build-info.cpp.in" "${CMAKE_CURRENT_LIST_DIR}/../build-info.cpp")
"""


@dataclass(frozen=True)
class Toolchain:
    """llama.cpp or a fork of it.

    Attributes:
        package, version: the source distribution that carries it.
        cmake: options of its build besides CMAKE.
        bench: options of its llama-bench.
    """

    name: str
    package: str
    version: str
    cmake: tuple[str, ...] = ()
    bench: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return engines_directory() / self.name

    @property
    def environment(self) -> Environment:
        return Environment(
            self.folder / "env", (("install", "cmake==4.4.4", "ninja==1.13.2", "gguf==0.19.0"),), "import gguf"
        )

    def tool(self, name: str) -> Path:
        return self.folder / "build" / "bin" / name

    def _source(self) -> Path:
        """Fetches and unpacks the sources; returns the folder of the C++ project."""
        log, source = self.folder / "build.log", self.folder / f"source-{self.version}"
        if not source.exists():
            with finished(source) as temporary:
                run_step(
                    f"fetching {self.package}",
                    [
                        self.environment.python,
                        "-m",
                        "pip",
                        "download",
                        "--no-deps",
                        "--no-binary",
                        self.package,
                        "-d",
                        temporary,
                        f"{self.package}=={self.version}",
                    ],
                    log,
                )
                for archive in temporary.glob("*.tar.gz"):
                    with tarfile.open(archive) as tar:
                        tar.extractall(temporary, filter="data")
        project = next((file.parent for file in source.glob("*/vendor/*llama.cpp/CMakeLists.txt")), None)
        if project is None:
            raise EngineUnavailable(f"{self.package} {self.version} carries no vendor/*llama.cpp/CMakeLists.txt")
        if not (project / BUILD_INFO).exists():
            (project / BUILD_INFO).parent.mkdir(exist_ok=True)
            (project / BUILD_INFO).write_text(BUILD_INFO_SCRIPT)
        return project

    @property
    def _recipe(self) -> list:
        return [self.package, self.version, CMAKE, self.cmake]

    @property
    def ready(self) -> bool:
        return self.environment.ready and is_complete(self.folder / "build", self._recipe)

    @tried_once
    def prepare(self, show: Show) -> None:
        self.environment.prepare(show)
        if self.ready:
            return
        build, bin_folder, log = self.folder / "build", self.environment.folder / "bin", self.folder / "build.log"
        if not shutil.which(os.environ.get("CXX", "c++")):
            raise EngineUnavailable("no C++ compiler: apt-get install g++ (or set CXX)")
        shutil.rmtree(build, ignore_errors=True)
        show(f"fetching and building {self.name}, for many minutes; {log} grows")
        run_step(
            f"configuring {self.name}",
            [bin_folder / "cmake", "-S", self._source(), "-B", build, *CMAKE, *self.cmake],
            log,
            path=bin_folder,
        )
        jobs = str(len(os.sched_getaffinity(0)))
        run_step(
            f"building {self.name}",
            [bin_folder / "cmake", "--build", build, "-j", jobs, "--target", *TOOLS],
            log,
            path=bin_folder,
        )
        mark_complete(build, self._recipe)


LLAMA_CPP = Toolchain("llama.cpp", "llama-cpp-python", "0.3.36")
# Run-time repacking is what makes the fork fast; it interleaves the rows of a weight while loading. Its attention over
# quantised caches would take most of the compile time, and is not measured: caches are fp16, the default.
IK_LLAMA_CPP = Toolchain(
    "ik_llama.cpp", "ik-llama-cpp-python", "0.1.5", cmake=("-DGGML_IQK_FA_ALL_QUANTS=OFF",), bench=("-rtr", "1")
)


@dataclass(frozen=True)
class LlamaEngine:
    """The text model in one format ("bf16", "Q8_0", "Q4_0"). All toolchains read the same files, which llama.cpp
    writes.
    """

    toolchain: Toolchain
    format: str
    checkpoint: Path
    prompts: ClassVar[tuple[str, ...]] = ("text",)

    @property
    def name(self) -> str:
        return f"{self.toolchain.name} {self.format}"

    @property
    def version(self) -> str:
        return f"{self.toolchain.name} of {self.toolchain.package} {self.toolchain.version}"

    @property
    def file(self) -> Path:
        return models_directory(self.checkpoint) / f"{self.format}.gguf"

    def prepare(self, show: Show) -> None:
        LLAMA_CPP.prepare(show)
        self._write(show)
        self.toolchain.prepare(show)

    def _write(self, show: Show) -> None:
        if self.file.exists():
            return
        log = self.file.with_suffix(".log")
        if self.format == "bf16":
            show(f"writing {self.file}")
            with finished(self.file) as temporary:
                command = [LLAMA_CPP.environment.python, "-m", "bench.engines.write_gguf", self.checkpoint, temporary]
                run_step(f"writing {self.file.name}", command, log)
            return
        source = LlamaEngine(LLAMA_CPP, "bf16", self.checkpoint)
        source._write(show)
        show(f"quantising {self.file}")
        with finished(self.file) as temporary:
            run_step(
                f"quantising {self.file.name}",
                [LLAMA_CPP.tool("llama-quantize"), source.file, temporary, self.format],
                log,
            )

    def start(self, prompts: Path, threads: int) -> Worker:
        from bench import inputs

        command = [
            str(self.toolchain.tool("llama-bench")),
            "-m",
            str(self.file),
            "-t",
            str(threads),
            *self.toolchain.bench,
        ]
        worker = Worker(self.name, command=[sys.executable, "-m", "bench.engines.llama_worker"])
        worker.ask("load", command=command, prompt_tokens=inputs.load(prompts)["text"]["input_ids"].shape[1])
        return worker
