"""Decode CUDA graphs: capture and replay, streams and the random generator. Other devices run functions uncaptured."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, cuda

__all__ = ["CaptureFailed", "Cuda", "Device", "of"]

WARM_UP = 2  # runs before a capture: they compile kernels and allocate cuBLAS workspaces, which a capture may not do


class CaptureFailed(RuntimeError):
    """A function that runs without a graph cannot be captured in a CUDA graph."""


class Device:
    """A device without graphs: the CPU, on which tests run kernels in Triton's interpreter.

    Attributes:
        look_every: tokens between two checks whether all sequences have ended; on a GPU a check waits for the device.
    """

    look_every = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def active(self) -> contextlib.AbstractContextManager:
        """A context in which this is the current device."""
        return contextlib.nullcontext()

    def captured(self, function: Callable[[], None], pool: Any = None) -> "Captured":
        """``function``, which reads and writes buffers at fixed addresses, as one replay.

        Capturing may run the function, so it must not draw random numbers, which would advance the generator.
        Args:
            pool: memory pool of a graph that never runs at the same time; this graph shares it.
        Raises: CaptureFailed if it cannot be captured; else what the function raises.
        """
        return Captured(function)

    def follow(self, stream: cuda.Stream | None, tensors: Callable[[], list[Tensor]]) -> cuda.Stream | None:
        """Makes the current stream, which is returned, wait for ``stream``, on which ``tensors()`` were used last."""
        return None

    def generator_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_generator_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def return_freed_memory(self) -> None:
        """Returns the freed memory that PyTorch caches to the device."""


class Captured:
    """A captured function. ``pool``: the memory pool of its graph, or None."""

    def __init__(self, replay: Callable[[], None], graph: cuda.CUDAGraph | None = None) -> None:
        self.replay, self.pool = replay, None if graph is None else graph.pool()


class Cuda(Device):
    """A GPU, which need not be the current device. One capture at a time, on a separate stream."""

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
                    # CUDA calls of other threads, such as allocations, do not invalidate the capture.
                    with cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                        function()
                except RuntimeError as error:  # the warm-up runs were good, so the capture failed
                    raise CaptureFailed(str(error)) from error
            finally:
                caller.wait_stream(self._stream)
        return Captured(graph.replay, graph)

    def follow(self, stream: cuda.Stream | None, tensors: Callable[[], list[Tensor]]) -> cuda.Stream | None:
        current = cuda.current_stream(self.device)
        if stream is not None and stream != current:
            current.wait_stream(stream)
            for x in tensors():  # freed memory is reused only when this stream, too, is done with it
                x.record_stream(current)
        return current

    def generator_state(self) -> Tensor:
        return cuda.get_rng_state(self.device)

    def set_generator_state(self, state: Tensor) -> None:
        cuda.set_rng_state(state, self.device)

    def return_freed_memory(self) -> None:
        with self.active():
            cuda.empty_cache()


_devices: dict[torch.device, Device] = {}
_lock = threading.Lock()


def of(device: torch.device) -> Device:
    """The Device of a torch.device with an index."""
    with _lock:
        if device not in _devices:
            _devices[device] = (Cuda if device.type == "cuda" else Device)(device)
        return _devices[device]
