"""All that a captured step says to CUDA: device, streams, graphs and the generator. Elsewhere functions run as they
are.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, cuda

__all__ = ["CaptureFailed", "Cuda", "Device", "of"]

WARM_UP = 2  # runs before a capture: they compile kernels and fill cuBLAS workspaces, which a capture may not do


class CaptureFailed(RuntimeError):
    """A function that has just run cannot be held by a CUDA graph here."""


class Device:
    """One without graphs: the CPU, whose tensors Triton's interpreter takes in tests.

    Attributes:
        look_every: tokens between two looks at whether generation is over; on a GPU a look waits for the device.
    """

    look_every = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def active(self) -> contextlib.AbstractContextManager:
        """Inside, this is the current device."""
        return contextlib.nullcontext()

    def captured(self, function: Callable[[], None], pool: Any = None) -> "Captured":
        """``function``, which reads and writes buffers that stay where they are, as one replay. It may have run when
        this returns, so it
        must not draw random numbers: the generator would go on. ``pool``: of a graph that never runs at the same time,
        whose memory for intermediate results serves again.

        Raises: CaptureFailed if no graph can hold it; else what the function raises.
        """
        return Captured(function)

    def follow(self, stream: cuda.Stream | None, tensors: Callable[[], list[Tensor]]) -> cuda.Stream | None:
        """Orders what comes now after all work of ``stream``, on which ``tensors()`` were used last; returns the stream
        that is current now.
        """
        return None

    def generator_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_generator_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def give_memory_back(self) -> None:
        """What PyTorch keeps of freed memory becomes free for others."""


class Captured:
    """What ``Device.captured`` returns. ``pool``: of the graph's memory, or None."""

    def __init__(self, replay: Callable[[], None], graph: cuda.CUDAGraph | None = None) -> None:
        self.replay, self.pool = replay, None if graph is None else graph.pool()


class Cuda(Device):
    """A GPU, which need not be the current one. One capture at a time, on a stream of its own."""

    look_every = 8

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._lock, self._stream = threading.Lock(), None

    def active(self) -> contextlib.AbstractContextManager:
        return cuda.device(self.device)

    def captured(self, function: Callable[[], None], pool: Any = None) -> Captured:
        with self._lock, self.active():
            if self._stream is None:
                self._stream = cuda.Stream(self.device)
            caller = cuda.current_stream(self.device)
            self._stream.wait_stream(caller)
            try:
                with cuda.stream(self._stream):
                    for _ in range(WARM_UP):
                        function()
                graph = cuda.CUDAGraph()
                try:
                    # Calls of other threads are their own matter, allocations among them.
                    with cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                        function()
                except RuntimeError as error:  # after two good runs: the capture's fault
                    raise CaptureFailed(str(error)) from error
            finally:
                caller.wait_stream(self._stream)
        return Captured(graph.replay, graph)

    def follow(self, stream: cuda.Stream | None, tensors: Callable[[], list[Tensor]]) -> cuda.Stream | None:
        current = cuda.current_stream(self.device)
        if stream is not None and stream != current:
            current.wait_stream(stream)
            for x in tensors():  # freed memory must not be used again before this stream is done with it, too
                x.record_stream(current)
        return current

    def generator_state(self) -> Tensor:
        return cuda.get_rng_state(self.device)

    def set_generator_state(self, state: Tensor) -> None:
        cuda.set_rng_state(state, self.device)

    def give_memory_back(self) -> None:
        with self.active():
            cuda.empty_cache()


_devices: dict[torch.device, Device] = {}
_lock = threading.Lock()


def of(device: torch.device) -> Device:
    """The one of a tensor's device, whose index is known."""
    with _lock:
        if device not in _devices:
            _devices[device] = (Cuda if device.type == "cuda" else Device)(device)
        return _devices[device]
