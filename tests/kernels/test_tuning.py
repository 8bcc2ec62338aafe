"""Choosing between our kernels and PyTorch's: what is measured, kept, and ignored. Clocks and kernels are fake."""

import json
import multiprocessing
import random
from pathlib import Path

import pytest
import torch

import qvl_kernels
from qvl_kernels import config, dispatch, tuning
from qvl_kernels.ops.attention.selection import attention_work
from qvl_kernels.ops.linear.selection import linear_work
from qvl_kernels.ops.quantized_linear.selection import quantized_linear_work
from qvl_kernels.tuning import PYTORCH, QVL, Times, Work

KIND = tuning.linear_kind(torch.float32, few=False)


class Clock:
    """Time that passes in the calls of fake work only."""

    def __init__(self):
        self.now, self.calls = 100.0, []

    def __call__(self) -> float:
        return self.now

    def work(self, qvl: float, pytorch: float, *, kind: str = KIND, size: int = 64, constant: bool = True) -> Work:
        """Milliseconds of either side for all of the work, or for any slice of it."""

        def run(name, milliseconds):
            self.now += milliseconds / 1000
            self.calls.append(name)

        def calls(part):
            scale = 1.0 if constant else part / size
            return {QVL: lambda: run(QVL, qvl * scale), PYTORCH: lambda: run(PYTORCH, pytorch * scale)}

        return Work(kind, "1 x 2 to 3", size, calls)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A quiet machine that measures, whose cache folder is empty, in a process without answers."""
    clock = Clock()
    monkeypatch.setenv("QVL_TUNE", "1")
    monkeypatch.setenv("QVL_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_answers", {})
    monkeypatch.setattr(tuning, "_preemptions", lambda: 0)
    measure = tuning.measure
    monkeypatch.setattr(tuning, "measure", lambda works: measure(works, clock))
    return clock


def new_process(monkeypatch) -> None:
    monkeypatch.setattr(tuning, "_answers", {})


def kept_file() -> Path:
    (file,) = (config.cache_folder() / "tuning").iterdir()
    return file


# What is measured


@pytest.mark.parametrize(("qvl", "pytorch", "backend"), [(1.05, 1.0, PYTORCH), (1.0499, 1.0, QVL), (1.0, 9.0, QVL)])
def test_pytorch_must_be_five_percent_faster(qvl, pytorch, backend):
    assert Times(qvl, pytorch).chosen(tuning.attention_kind(torch.bfloat16, causal=False)) == backend


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_pytorch_must_make_up_for_fused_layers(bits):
    many = tuning.linear_kind(torch.bfloat16, few=False, bits=bits)
    assert [Times(qvl, 1.0).chosen(many) for qvl in (1.49, 1.5)] == [QVL, PYTORCH]
    assert Times(1.05, 1.0).chosen(tuning.linear_kind(torch.bfloat16, few=True, bits=bits)) == PYTORCH


@pytest.mark.parametrize(("qvl", "pytorch", "backend"), [(3.0, 2.0, PYTORCH), (2.0, 3.0, QVL)])
def test_the_faster_one_is_chosen(clock, qvl, pytorch, backend):
    assert tuning.chosen(KIND) == QVL
    work = clock.work(qvl, pytorch)
    tuning.settle([work])
    assert tuning.chosen(KIND) == backend
    assert tuning.describe([work]) == [f"{KIND}: {backend}, 2 ms against 3 ms"]


def test_the_fastest_of_interleaved_runs_counts(clock):
    work = clock.work(1.0, 2.0)
    (times,) = tuning.measure([work._replace(calls=lambda size: _slower_at_first(work.calls(size), clock))]).values()
    assert times == pytest.approx((1.0, 2.0))
    assert clock.calls[:6] == [QVL, PYTORCH] * 3


def _slower_at_first(calls, clock):
    left = {QVL: 3, PYTORCH: 3}

    def run(name):
        left[name] -= 1
        clock.now += 0.005 if left[name] > 0 else 0.0
        calls[name]()

    return {name: lambda name=name: run(name) for name in calls}


@pytest.mark.parametrize(("milliseconds", "expected"), [(1.0, 1.0), (40.0, 40.0 / 4), (320.0, 320.0 / 16)])
def test_slices_are_as_large_as_time_allows(clock, milliseconds, expected):
    (times,) = tuning.measure([clock.work(milliseconds, milliseconds, constant=False)]).values()
    assert times.qvl == pytest.approx(expected)


@pytest.mark.parametrize("milliseconds", [0.01, 1.0, 10.0, 29.0, 100.0, 10_000.0])
@pytest.mark.parametrize("count", [1, 7])
def test_time_is_limited(clock, milliseconds, count):
    """One call may begin just before the end."""
    works = [clock.work(milliseconds, milliseconds / 2, kind=str(index)) for index in range(count)]
    start = clock.now
    tuning.settle(works)
    assert clock.now - start <= tuning.SECONDS + milliseconds / 1000
    answered = [work for work in works if tuning.chosen(work.kind) == PYTORCH]
    assert len(answered) == (count if milliseconds <= 1.0 else 0 if milliseconds >= 100.0 else len(answered))


def test_disturbed_runs_do_not_count(clock, monkeypatch):
    """Every second run is slow, and other programs had the core meanwhile."""
    numbers = iter(range(1000))
    monkeypatch.setattr(tuning, "_preemptions", lambda: next(numbers))
    tuning.settle([clock.work(2.0, 1.0)])
    assert tuning.chosen(KIND) == QVL and not (config.cache_folder() / "tuning").exists()


def test_what_was_not_measured_is_measured_by_the_next_process(clock, monkeypatch):
    slow, fast = clock.work(20.0, 10.0, kind="slow"), clock.work(0.2, 0.1, kind="fast")
    tuning.settle([slow, fast])
    assert (tuning.chosen("slow"), tuning.chosen("fast")) == (PYTORCH, PYTORCH)
    tuning.settle([clock.work(100.0, 50.0, kind="slower")])
    assert tuning.chosen("slower") == QVL
    new_process(monkeypatch)
    tuning.settle([clock.work(1.0, 0.5, kind="slower"), fast, slow])
    assert tuning.chosen("slower") == PYTORCH


# What is kept


def test_the_answer_is_kept_for_later_processes(clock, monkeypatch):
    tuning.settle([clock.work(2.0, 1.0)])
    new_process(monkeypatch)
    clock.calls.clear()
    work = clock.work(1.0, 2.0)
    assert tuning.describe([work]) == [f"{KIND}: pytorch, 1 ms against 2 ms"]
    tuning.settle([work])
    assert tuning.chosen(KIND) == PYTORCH and not clock.calls
    assert [file.suffix for file in kept_file().parent.iterdir()] == [".json"]


def test_an_answer_stays_within_a_process(clock):
    tuning.settle([clock.work(2.0, 1.0)])
    kept_file().unlink()
    tuning.settle([clock.work(1.0, 2.0)])
    assert tuning.chosen(KIND) == PYTORCH


def test_other_shapes_are_measured_apart(clock, monkeypatch):
    tuning.settle([clock.work(2.0, 1.0)])
    new_process(monkeypatch)
    tuning.settle([clock.work(1.0, 2.0)._replace(shape="4 x 5 to 6")])
    assert tuning.chosen(KIND) == QVL
    new_process(monkeypatch)
    tuning.settle([clock.work(1.0, 2.0)])
    assert tuning.chosen(KIND) == PYTORCH


CHANGES = [
    ("threads", lambda patch: patch(torch, "get_num_threads", lambda: 77)),
    ("affinity", lambda patch: patch("os.sched_getaffinity", lambda process: {77})),
    ("torch", lambda patch: patch(torch, "__version__", "77.0")),
    ("build", lambda patch: patch(tuning.dispatch.extension(), "__file__", __file__)),
    ("isa", lambda patch: patch(tuning.dispatch, "extension", lambda: OtherIsa)),
]


class OtherIsa:
    __file__ = qvl_kernels.dispatch.extension().__file__

    @staticmethod
    def isa() -> str:
        return "other"


@pytest.mark.parametrize("change", [change for _, change in CHANGES], ids=[name for name, _ in CHANGES])
def test_another_machine_is_measured_again(clock, monkeypatch, change):
    tuning.settle([clock.work(2.0, 1.0)])
    new_process(monkeypatch)
    change(monkeypatch.setattr)
    tuning.settle([clock.work(1.0, 2.0)])
    assert tuning.chosen(KIND) == QVL
    assert len(list((config.cache_folder() / "tuning").iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[1]",
        b"null",
        b'{"machine": {}, "milliseconds": {}}',
        "not a number",
        float("nan"),
        -1.0,
        0,
        None,
        [1, 2],
    ],
    ids=repr,
)
def test_a_damaged_file_is_ignored_and_replaced(clock, monkeypatch, content):
    tuning.settle([clock.work(2.0, 1.0)])
    good = json.loads(kept_file().read_text())
    if not isinstance(content, bytes):
        name = next(iter(good["milliseconds"]))
        bad = {**good, "milliseconds": {name: [content, 1.0]}}
        content = json.dumps(bad).encode()
    kept_file().write_bytes(content)
    new_process(monkeypatch)
    tuning.settle([clock.work(1.0, 2.0)])
    assert tuning.chosen(KIND) == QVL
    assert json.loads(kept_file().read_text())["machine"] == good["machine"]


def test_a_cache_folder_that_cannot_be_written_is_ignored(clock, monkeypatch, tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("QVL_CACHE", str(blocked))
    tuning.settle([clock.work(2.0, 1.0)])
    assert tuning.chosen(KIND) == PYTORCH

    def refuse(*args):
        raise OSError("disk full")

    new_process(monkeypatch)
    monkeypatch.setenv("QVL_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning.os, "replace", refuse)
    tuning.settle([clock.work(2.0, 1.0)])
    assert tuning.chosen(KIND) == PYTORCH and not list((tmp_path / "tuning").iterdir())

    def homeless():
        raise RuntimeError("no home folder")

    new_process(monkeypatch)
    monkeypatch.delenv("QVL_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    tuning.settle([clock.work(2.0, 1.0)])
    assert tuning.chosen(KIND) == PYTORCH


def _write_often(number: int) -> None:
    machine = {"any": 1}
    for index in range(100):
        tuning._store(machine, {f"kind {number}": Times(1.0 + index, 2.0)})
        assert tuning._load(machine), "a reader saw an incomplete file"


def test_writers_at_the_same_time(clock):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(_write_often, range(3))
    assert len(tuning._load({"any": 1})) == 1
    assert [file.suffix for file in kept_file().parent.iterdir()] == [".json"]


# When nothing is measured


@pytest.mark.parametrize("isas", ["portable, avx512_bf16", "portable, avx512_bf16, amx"])
def test_the_static_table(isas, clock, monkeypatch):
    monkeypatch.setenv("QVL_TUNE", "0")
    monkeypatch.setattr(dispatch.extension(), "supported_isas", lambda: isas)
    tuning._static_choice.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    try:
        kinds = [tuning.linear_kind(dtype, few) for dtype in (torch.bfloat16, torch.float16) for few in (False, True)]
        kinds += [tuning.linear_kind(torch.bfloat16, few=False, bits=bits) for bits in (8, 4)]
        kinds += [tuning.attention_kind(torch.bfloat16, causal) for causal in (False, True)]
        tuning.settle([clock.work(2.0, 1.0, kind=kind) for kind in kinds])
        prefill = QVL if "amx" in isas else PYTORCH
        assert [tuning.chosen(kind) for kind in kinds] == [prefill, QVL, QVL, QVL, QVL, QVL, prefill, prefill]
        assert tuning.describe([clock.work(2.0, 1.0)]) == [f"{KIND}: qvl, not measured"]
    finally:
        tuning._static_choice.cache_clear()
    assert not clock.calls and not list(config.cache_folder().iterdir())


def test_a_bad_switch_is_named(monkeypatch):
    monkeypatch.setenv("QVL_TUNE", "2")
    with pytest.raises(ValueError, match="QVL_TUNE=2 means nothing"):
        tuning.settle([])


def test_nothing_is_measured_where_calls_are_watched(clock, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode

    work = clock.work(2.0, 1.0)
    for context in (
        qvl_kernels.use_backend("reference"),
        qvl_kernels.use_backend("cpp"),
        FakeTensorMode(),
        TorchFunctionMode(),
        torch.autograd.forward_ad.dual_level(),
    ):
        with context:
            tuning.settle([work])
    torch.func.vmap(lambda x: (tuning.settle([work]), x)[1])(torch.zeros(2))
    torch.jit.trace(lambda x: (tuning.settle([work]), x + 1)[1], torch.zeros(2), check_trace=False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    tuning.settle([work])
    assert not clock.calls and tuning.chosen(KIND) == QVL


def test_nothing_else_changes(clock, monkeypatch):
    """With the real kernels."""
    monkeypatch.undo()
    works = [
        *(linear_work(dtype, 96, 64, few=few) for dtype in (torch.float32, torch.bfloat16) for few in (False, True)),
        *(quantized_linear_work(torch.bfloat16, 96, 128, bits, 64, zero_points=bits == 4) for bits in (8, 4)),
        *(attention_work(torch.float16, 2, 1, 32, causal=causal) for causal in (False, True)),
    ]
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            found = tuning.measure(works)
            assert torch.is_grad_enabled() == grad
    assert found.keys() <= {work.name for work in works}
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.get_num_threads()) == before[1:]


@pytest.mark.parametrize(
    "work",
    [
        linear_work(torch.bfloat16, 96, 64, few=False),
        linear_work(torch.bfloat16, 96, 64, few=True),
        quantized_linear_work(torch.bfloat16, 96, 128, 8, 128, zero_points=False),
        quantized_linear_work(torch.bfloat16, 96, 128, 4, 64, zero_points=False),
        quantized_linear_work(torch.bfloat16, 95, 128, 4, 32, zero_points=True),
        attention_work(torch.bfloat16, 4, 2, 32, causal=True),
    ],
    ids=lambda work: work.name,
)
def test_both_sides_of_real_work_run(work):
    for size in (1, work.size):
        for run in work.calls(size).values():
            run()
            run()
