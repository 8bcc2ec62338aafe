"""OpenVINO through optimum-intel, whose ``generate`` is that of transformers."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.client import Worker, WorkerError
from bench.engines.checkpoints import models_directory, old_style
from bench.engines.environment import EngineUnavailable, Environment, Show, engines_directory, finished

__all__ = ["OpenVINOEngine", "environment"]

PACKAGES = ("optimum-intel[openvino]==2.2.0", "openvino==2026.4.1", "nncf==3.4.0", "transformers==4.57.6")


def environment() -> Environment:
    # Torch goes in first and pinned, so that nothing chooses another build; torchvision's wheel for it breaks the
    # import of transformers' processors.
    steps = (("install", "torch==2.13.0"), ("install", "torch==2.13.0", *PACKAGES), ("uninstall", "-y", "torchvision"))
    return Environment(
        engines_directory() / "openvino" / "env", steps, "from optimum.intel import OVModelForVisualCausalLM"
    )


@dataclass(frozen=True)
class OpenVINOEngine:
    """The whole model with weights of 8 bits per channel, or of 4 bits in groups of 64."""

    bits: int
    checkpoint: Path
    prompts: ClassVar[tuple[str, ...]] = ("image", "text", "long")
    version: ClassVar[str] = ", ".join(PACKAGES)

    @property
    def name(self) -> str:
        return f"openvino int{self.bits}"

    @property
    def folder(self) -> Path:
        return models_directory(self.checkpoint) / f"openvino-int{self.bits}"

    def _worker(self) -> Worker:
        return Worker(self.name, command=[str(environment().python), "-m", "bench.engines.open_vino_worker"])

    def prepare(self, show: Show) -> None:
        environment().prepare(show)
        if self.folder.exists():
            return
        show(f"exporting {self.folder}, for minutes")
        source = self.folder.with_name("transformers-4")
        shutil.rmtree(source, ignore_errors=True)
        with finished(self.folder) as temporary:
            old_style(self.checkpoint, source)
            try:
                with self._worker() as worker:
                    worker.ask("export", source=str(source), destination=str(temporary), bits=self.bits)
            except WorkerError as error:
                lines = str(error).strip().splitlines()
                raise EngineUnavailable(f"{lines[0]} {lines[-1]}") from error

    def start(self, prompts: Path, threads: int) -> Worker:
        worker = self._worker()
        worker.ask("load", path=str(self.folder), prompts=str(prompts), threads=threads)
        return worker
