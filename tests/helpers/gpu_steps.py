"""Runs the GPU's decode step without a GPU: on CPU tensors, unchanged or under a recording fake of ``torch.cuda``."""

import contextlib

import torch

from qvl_model.generation import graphs, step_gpu

INDEX = torch.device("cuda", 1)  # of the fake GPU, which is not the current device


class FakeStream:
    def __init__(self, cuda: "FakeCuda", name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: "FakeStream") -> None:
        self.cuda.calls.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """``torch.cuda`` for CPU tensors: records each call with the current device and stream."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.devices, self.streams = [0], [FakeStream(self, "caller")]
        self.capturing, self.fails, self.made = False, None, 0

    def replayed(self) -> list[str]:
        return [call for call in self.calls if call.startswith("replay")]

    @contextlib.contextmanager
    def device(self, device):
        self.devices.append(device.index)
        try:
            yield
        finally:
            self.devices.pop()

    @contextlib.contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def current_stream(self, device):
        return self.streams[-1]

    def Stream(self, device):  # noqa: N802
        self.made += 1
        self.calls.append(f"new stream on {device.index}")
        return FakeStream(self, f"capture stream {self.made}")

    def CUDAGraph(self):  # noqa: N802
        return FakeGraph(self)

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.calls.append(
            f"capture on {self.devices[-1]}, {stream.name}, {capture_error_mode}, "
            f"{'own' if pool is None else 'shared'} memory"
        )
        with self.stream(stream):
            if self.fails is not None:
                raise self.fails
            yield

    def get_rng_state(self, device):
        return torch.get_rng_state()

    def set_rng_state(self, state, device):
        torch.set_rng_state(state)

    def empty_cache(self):
        self.calls.append(f"empty the allocator of {self.devices[-1]}")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.function = cuda, None

    def pool(self):
        return id(self)

    def replay(self):
        self.cuda.calls.append(f"replay on {self.cuda.devices[-1]}, {self.cuda.streams[-1].name}")
        self.function()


class Recorded(graphs.Cuda):
    """A ``Cuda`` over the fake: the captured function runs at each replay."""

    def __init__(self, cuda: FakeCuda, device: torch.device = INDEX) -> None:
        super().__init__(device)
        self.cuda = cuda

    def captured(self, function, pool=None):
        def ran():
            self.cuda.calls.append(f"run on {self.cuda.devices[-1]}, {self.cuda.streams[-1].name}")
            function()

        captured = super().captured(ran, pool)
        captured.replay.__self__.function = function
        return captured


def record(monkeypatch) -> FakeCuda:
    """Makes steps run under a fake of ``torch.cuda``."""
    cuda = FakeCuda()
    device = Recorded(cuda)
    monkeypatch.setattr(graphs, "cuda", cuda)
    monkeypatch.setattr(graphs, "of", lambda device_: device)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, stream: cuda.calls.append(f"memory used on {stream.name}")
    )
    return cuda


def offer(monkeypatch) -> None:
    """Makes accelerated models decode with ``GpuStep`` on any device."""
    monkeypatch.setattr(step_gpu, "why_no_graphs", lambda device: None)
    monkeypatch.setattr(step_gpu, "_pools", type(step_gpu._pools)())


def begun(monkeypatch) -> list[step_gpu.GpuStep]:
    """A list that receives every step that begins."""
    steps, begin = [], step_gpu.GpuStep._begin
    monkeypatch.setattr(step_gpu.GpuStep, "_begin", lambda step, *args: steps.append(step) or begin(step, *args))
    return steps


def idle(model) -> list[step_gpu.GpuStep]:
    """The steps that are kept for the next calls."""
    return step_gpu._pools[model]._idle
