"""Other engines on the same checkpoint, each in an environment of its own: OpenVINO, llama.cpp and ik_llama.cpp.

    python -m bench.engines    prepares them under the benchmark's cache, once

The modules import the standard library only: workers and tools run in the other engines' environments.
"""

from pathlib import Path
from typing import Protocol

from bench.client import Worker
from bench.engines.environment import EngineUnavailable, Show
from bench.engines.llama_cpp import IK_LLAMA_CPP, LLAMA_CPP, LlamaEngine
from bench.engines.open_vino import OpenVINOEngine

__all__ = ["Engine", "EngineUnavailable", "engines_of", "prepared"]


class Engine(Protocol):
    """One engine with weights in one format.

    Attributes:
        name: as in "openvino int8" or "llama.cpp Q8_0".
        version: of what is measured.
        prompts: those of "image", "text" and "long" that it takes.

    Example:
        >>> engine.prepare(print)
        >>> with engine.start(file, threads=2) as worker:
        ...     worker.ask("warm_up")
        ...     worker.ask("generate", prompt="text", tokens=33)  # {"first": 1.8, "per_token": 0.083}
        ...     worker.ask("peak_rss")
    """

    name: str
    version: str
    prompts: tuple[str, ...]

    def prepare(self, show: Show) -> None:
        """Installs, builds and converts what is missing. Raises EngineUnavailable, with the reason, if that is
        not possible here.
        """

    def start(self, prompts: Path, threads: int) -> Worker:
        """A worker that has loaded the model. ``prompts``: a file that bench.inputs.save wrote."""


def engines_of(checkpoint: Path) -> list[Engine]:
    """Every engine and format, for a Qwen3-VL checkpoint."""
    formats = ("bf16", "Q8_0", "Q4_0")
    return [
        *(LlamaEngine(LLAMA_CPP, format, checkpoint) for format in formats),
        *(OpenVINOEngine(bits, checkpoint) for bits in (8, 4)),
        *(LlamaEngine(IK_LLAMA_CPP, format, checkpoint) for format in formats),
    ]


def prepared(engines: list[Engine], show: Show) -> tuple[list[Engine], dict[str, str]]:
    """Prepares engines. Returns those that can be measured, and the reasons of the others by name."""
    ready, skipped = [], {}
    for engine in engines:
        try:
            engine.prepare(lambda text: show(f"{engine.name}: {text}"))
            ready.append(engine)
        except EngineUnavailable as reason:
            skipped[engine.name] = str(reason)
    return ready, skipped
