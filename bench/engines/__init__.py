"""Other engines on the same checkpoint, each in an environment of its own: OpenVINO, llama.cpp and ik_llama.cpp.

    python -m bench.engines    prepares them under the benchmark's cache, once

The modules import the standard library only: workers and tools run in the other engines' environments.
"""

from pathlib import Path
from typing import Protocol

from bench.client import Worker
from bench.engines.environment import PeerUnavailable, Show
from bench.engines.llama_cpp import IK_LLAMA_CPP, LLAMA_CPP, LlamaPeer
from bench.engines.open_vino import OpenVINOPeer

__all__ = ["Peer", "PeerUnavailable", "peers_of", "prepared"]


class Peer(Protocol):
    """One engine with weights in one format.

    Attributes:
        name: as in "openvino int8" or "llama.cpp Q8_0".
        version: of what is measured.
        prompts: those of "image", "text" and "long" that it takes.

    Example:
        >>> peer.prepare(print)
        >>> with peer.start(file, threads=2) as worker:
        ...     worker.ask("warm_up")
        ...     worker.ask("generate", prompt="text", tokens=33)  # {"first": 1.8, "per_token": 0.083}
        ...     worker.ask("peak_rss")
    """

    name: str
    version: str
    prompts: tuple[str, ...]

    def prepare(self, show: Show) -> None:
        """Installs, builds and converts what is missing. Raises PeerUnavailable with the reason if that is not possible
        here.
        """

    def start(self, prompts: Path, threads: int) -> Worker:
        """A worker that has loaded the model. ``prompts``: a file that bench.inputs.save wrote."""


def peers_of(checkpoint: Path) -> list[Peer]:
    """Every peer, for a Qwen3-VL checkpoint."""
    formats = ("bf16", "Q8_0", "Q4_0")
    return [
        *(LlamaPeer(LLAMA_CPP, format, checkpoint) for format in formats),
        *(OpenVINOPeer(bits, checkpoint) for bits in (8, 4)),
        *(LlamaPeer(IK_LLAMA_CPP, format, checkpoint) for format in formats),
    ]


def prepared(peers: list[Peer], show: Show) -> tuple[list[Peer], dict[str, str]]:
    """Prepares peers. Returns those that can be measured, and of the others why not, by name."""
    ready, skipped = [], {}
    for peer in peers:
        try:
            peer.prepare(lambda text: show(f"{peer.name}: {text}"))
            ready.append(peer)
        except PeerUnavailable as reason:
            skipped[peer.name] = str(reason)
    return ready, skipped
