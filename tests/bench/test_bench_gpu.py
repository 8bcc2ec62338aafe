"""The GPU benchmark without a GPU: isolation of cases, building, targets, tables and charts; small cases run on the
CPU.
"""

import json
import os
import signal
import time

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import kernels as gpu_kernels
from bench.gpu import models as gpu_models
from bench.gpu import report as gpu_report
from bench.gpu.targets import BANDWIDTH_KERNELS, TARGETS, bandwidth_share, speed
from bench.gpu.timing import compare, peak_bytes
from bench.isolated import run_all
from bench.targets import verdict
from qvl_kernels import config

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(config.interpreted(), reason="the interpreter replaces what is compiled here")


def _times(median):
    return {"median": median, "low": median, "high": median, "values": [median]}


def _result(**cases):
    return {
        "gpu": {"name": "Test GPU 80GB", "memory": 80 << 30, "capability": [9, 0], "versions": {"torch": "2.11.0"}},
        "date": "2026-01-01",
        "commit": "abc",
        "cases": {name.replace("_", " "): {"value": value} for name, value in cases.items()},
    }


def test_a_crash_a_hang_and_an_error_cost_one_result_each():
    def hang():
        time.sleep(60)

    tasks = [
        ("good", lambda: 41 + 1, 20.0),
        ("crash", lambda: os.kill(os.getpid(), signal.SIGKILL), 20.0),
        ("hang", hang, 0.5),
        ("error", lambda: 1 // 0, 20.0),
        ("unpicklable", lambda: lambda: 0, 20.0),
        ("exit", lambda: os._exit(3), 20.0),
    ]
    start = time.monotonic()
    answers = dict(run_all(tasks, jobs=2))
    assert time.monotonic() - start < 20
    assert answers["good"] == {"value": 42}
    assert "exit code -9" in answers["crash"]["error"] and "exit code 3" in answers["exit"]["error"]
    assert "longer than" in answers["hang"]["error"]
    assert "ZeroDivisionError" in answers["error"]["error"] and "Traceback" in answers["error"]["log"]
    assert "error" in answers["unpicklable"]


def test_what_a_late_task_started_ends_with_it(tmp_path):
    file = tmp_path / "pid"
    tasks = [("late", lambda: os.system(f"sleep 60 & echo $! > {file}; wait"), 1.0)]
    assert "longer than" in dict(run_all(tasks))["late"]["error"]
    child = int(file.read_text())
    for _ in range(100):
        try:
            state = open(f"/proc/{child}/stat").read().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the grandchild still runs")


def test_contestants_take_turns():
    order = []
    times = compare({name: lambda n=name: order.append(n) for name in "abc"}, CPU, seconds=1e-9)
    rounds = "".join(order[9:])  # after two warm-ups and one estimate each
    assert rounds == "abcbcacababcbca"
    assert all(
        len(value["values"]) == 5 and value["low"] <= value["median"] <= value["high"] for value in times.values()
    )
    assert peak_bytes(lambda: order.append("d"), CPU) == 0 and order[-1] == "d"


@pytest.mark.parametrize(
    "case",
    [
        gpu_kernels._elementwise("small swiglu", "swiglu", {"gate": (6, 64), "up": (6, 64)}, 3 * 6 * 64),
        gpu_kernels._attention("small attention", 2, 12, 4, 2, 32, causal=True),
        gpu_kernels._attention("small varlen", 2, 12, 4, 4, 32, causal=False, varlen=True),
        gpu_kernels._cross_attention(2, 5, 20, 4, 32),
        gpu_kernels._decode_attention("small decode", 2, 20, 4, 2, 32),
        gpu_kernels._linear_cross_entropy(9, 64, 32),
        gpu_kernels._linear("small int8", 3, 64, 128, bits=8),
        gpu_kernels._linear("small int4", 3, 64, 128, bits=4),
        gpu_kernels._patch_embed(4, 32),
    ],
    ids=lambda case: case.name,
)
def test_kernel_cases_run(case):
    if case.op == "swiglu":  # the one whose baselines include torch.compile, which is slow here
        baselines = case.baselines
        case = gpu_kernels.KernelCase(**{**vars(case), "baselines": lambda: {"eager": baselines()["eager"]}})
    value = gpu_kernels.run(case, CPU, seconds=1e-9)
    assert value["errors"]["ours"] < 2e-2
    assert value["forward"]["ours"]["median"] > 0 and set(value["forward"]) - {"copy"} == set(value["errors"])
    assert ("backward" in value) == case.backward and ("memory" in value) == case.memory
    assert json.loads(json.dumps(value)) == value
    if case.op == "attention":
        assert "cudnn" in value["unavailable"] and "sdpa" in value["forward"]


def test_an_unsound_kernel_is_seen_in_the_errors(monkeypatch):
    import qvl_kernels

    monkeypatch.setattr(
        qvl_kernels, "patch_embed", lambda pixels, weight, bias: torch.zeros(pixels.shape[0], weight.shape[0])
    )
    value = gpu_kernels.run(gpu_kernels._patch_embed(4, 32), CPU, seconds=1e-9)
    assert value["errors"]["ours"] == pytest.approx(1.0)
    error = next(item for item in TARGETS if item.target.key == "error")
    assert verdict(error.target, error.value({"patch_embed": value})) == "miss"


def test_every_kernel_case_builds_without_a_gpu():
    assert len({case.name for case in gpu_kernels.CASES}) == len(gpu_kernels.CASES)
    built = gpu_kernels.build(next(case for case in gpu_kernels.CASES if case.name == "swiglu"))
    assert built == {"kernels": ["_swiglu_backward_kernel", "_swiglu_kernel"], "violations": []}
    assert set(BANDWIDTH_KERNELS) <= {case.name for case in gpu_kernels.CASES}


def test_model_cases_run_and_agree():
    value = gpu_models.generate(gpu_models.SMALL, CPU)
    assert set(value["first"]) == set(value["decode"]) == set(value["vision"]) == {"stock", "ours"} and set(
        value["replay"]
    ) == {"ours", "PDL"}
    assert value["errors"]["ours"] <= 2 * value["errors"]["stock"] + 1e-3
    parity = {}
    built = gpu_models.build(lambda sizes, device: parity.update(gpu_models.parity(sizes, device)) or parity)
    assert built["parameters"] == 2_127_532_032 and built["measured"] == ["difference", "first_loss", "last_loss"]
    assert parity["difference"] < 1e-3 and parity["last_loss"] < parity["first_loss"]


def test_without_a_gpu_cases_are_built(capsys, monkeypatch):
    torch.randn(512, 512) @ torch.randn(
        512, 512
    )  # run OpenMP in this process before it forks, whatever the order of tests
    assert command.main(["--case", "swiglu", "--case", "loss parity", "--case", "GPU tests"]) == 0
    out = capsys.readouterr().out
    assert (
        "no GPU: every case is built" in out
        and "swiglu: _swiglu_backward_kernel, _swiglu_kernel" in out
        and "no GPU: 3 of 3 cases built" in out
    )
    broken = [
        command.Entry("broken", 1.0, lambda: {}, lambda: 1 // 0),
        command.Entry("elsewhere", 1.0, lambda: {}, lambda: 1 // 0, "no_such_module"),
    ]
    monkeypatch.setattr(command, "ENTRIES", broken)
    assert command.main([]) == 1
    out = capsys.readouterr().out
    assert (
        "broken: ZeroDivisionError" in out
        and "no GPU: 0 of 1 cases built" in out
        and "elsewhere: left out, no_such_module is not installed" in out
    )


def test_a_run_writes_after_every_case_and_survives_bad_ones(tmp_path, monkeypatch, capsys):
    def last():
        """Reads the file that the earlier cases wrote."""
        return {"seen": sorted(json.loads((tmp_path / "test-gpu-80gb.json").read_text())["cases"])}

    times = {
        "forward": {"ours": _times(1.0), "eager": _times(3.0)},
        "bytes": 2e9,
        "flops": 0.0,
        "errors": {"ours": 0.001, "eager": 0.001},
    }
    entries = [
        command.Entry("copy", 20.0, lambda: {"gb_s": 2500.0, "milliseconds": _times(1.0)}, dict),
        command.Entry("swiglu", 20.0, lambda: times, dict, compile=lambda: (tmp_path / "compiled").touch()),
        command.Entry("elsewhere", 20.0, dict, dict, "no_such_module"),
        command.Entry("hangs", 0.5, lambda: time.sleep(60), dict),
        command.Entry("fails", 20.0, lambda: 1 // 0, dict),
        command.Entry(
            "GPU tests",
            20.0,
            lambda: {"passed": 5, "failed": 1, "skipped": 0, "failures": [], "crashed": []},
            dict,
            early=True,
        ),
        command.Entry("last", 20.0, last, dict),
    ]
    monkeypatch.setattr(command, "ENTRIES", entries)
    monkeypatch.setattr(command, "probe", lambda: _result()["gpu"])
    assert command.main(["--output", str(tmp_path)]) == 1  # a GPU test failed
    cases = json.loads((tmp_path / "test-gpu-80gb.json").read_text())["cases"]
    assert cases["last"]["value"]["seen"] == sorted(entry.name for entry in entries[:-1])
    assert "longer than" in cases["hangs"]["error"] and "not installed" in cases["elsewhere"]["error"]
    assert next(iter(cases)) == "GPU tests" and (tmp_path / "compiled").exists()
    assert (tmp_path / "test-gpu-80gb.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert (
        "5 passed, 1 failed" in out
        and "80 % of copy" in out
        and "eager 3.00×" in out
        and "fails: ZeroDivisionError" in out
    )
    assert command.main(["--output", str(tmp_path), "--minutes", "0"]) == 0
    cases = json.loads((tmp_path / "test-gpu-80gb.json").read_text())["cases"]
    assert all("left out" in case["error"] for case in cases.values())


def test_gpu_tests_are_run_in_parts(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('i', range(7))\ndef test_i(i):\n    assert i != 3\n\n"
        "def test_skipped():\n    pytest.skip('so')\n"
    )
    value = command.run_tests(".", root=tmp_path, jobs=2)
    assert (value["passed"], value["failed"], value["skipped"], value["crashed"]) == (6, 1, 1, [])
    assert value["not_run"] == 0 and len(value["failures"]) == 1 and "test_i[3]" in value["failures"][0]
    with pytest.raises(RuntimeError, match="no tests"):
        command.run_tests("nothing", root=tmp_path)


def test_gpu_tests_stop_in_time(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import time\n\ndef test_quick():\n    pass\n\ndef test_slow():\n    time.sleep(60)\n"
    )
    value = command.run_tests(".", root=tmp_path, jobs=1, seconds=6.0)
    assert (
        (value["failed"], value["crashed"]) == (0, []) and value["passed"] + value["not_run"] == 2 and value["not_run"]
    )


def test_targets_follow_from_what_was_measured():
    norms = {
        name: {"forward": {"ours": _times(1.0), "liger": _times(1.1)}, "bytes": 2.4e9} for name in BANDWIDTH_KERNELS
    }
    attention = {
        "forward": {"ours": _times(1.0), "flash": _times(0.9), "cudnn": _times(2.0)},
        "backward": {"ours": _times(2.0), "flash": _times(1.9)},
    }
    cases = {
        **norms,
        "copy": {"gb_s": 3000.0},
        "attention train": attention,
        "swiglu": {**norms["swiglu"], "forward": {"ours": _times(1.25), "liger": _times(1.0)}},
        "generate": {
            "first": {"stock": _times(26.0), "ours": _times(20.0)},
            "decode": {"stock": _times(20.0), "ours": _times(2.0)},
            "replay": {"ours": _times(2.0)},
            "bytes_per_token": 3.44e9,
            "errors": {"stock": 0.01, "ours": 0.015},
        },
        "memory stock": {"weights": 4, "peak": 14},
        "memory accelerated": {"weights": 4, "peak": 12},
        "memory int8": {"weights": 2, "peak": 7},
        "train stock": {"step": _times(100.0), "peak": 100},
        "train accelerated": {"step": _times(50.0), "peak": 80},
        "fp16 in 8 GB": {"limit": 8e9, "peak": 6e9},
        "linear_cross_entropy": {
            "forward": {"ours": _times(1.0), "liger": _times(2.0)},
            "backward": {"ours": _times(1.0), "liger": _times(0.5)},
            "memory": {"ours": 3, "liger": 4},
        },
    }
    values = {item.target.key: item.value(cases) for item in TARGETS}
    expected = {
        "first": 1.3,
        "decode_1": 10.0,
        "decode_32": None,
        "memory": 0.8,
        "memory_int8": 0.5,
        "fits": 0.75,
        "train": 2.0,
        "train_memory": 0.8,
        "bandwidth": 2.4e9 / 1.25 / 1e6 / 3000,
        "liger": 0.8,
        "flash_forward": 0.9,
        "flash_backward": 0.95,
        "cross": None,
        "lce": 0.5,
        "lce_memory": 0.75,
        "error": 1.5,
        "decode_share": 3.44e9 / 2.0 / 1e6 / 3000,
        "decode_12": 10.0,
        "cudnn": 2.0,
        "first_18": 1.3,
    }
    assert values == pytest.approx(expected)
    verdicts = {item.target.key: verdict(item.target, values[item.target.key]) for item in TARGETS}
    assert (
        verdicts["first"] == "pass"
        and verdicts["first_18"] == "miss"
        and verdicts["decode_32"] == "–"
        and verdicts["memory"] == "pass"
    )
    assert all(item.value({}) is None for item in TARGETS)
    assert speed(cases, "generate", "vision", "stock") is None and bandwidth_share({}, "swiglu") is None
    assert len({item.target.key for item in TARGETS}) == len(TARGETS)


def test_markdown_section(tmp_path):
    assert "GPU figures are not measured yet" in gpu_report.markdown_section(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(_result(copy={"gb_s": 2.0, "milliseconds": _times(1.0)})))
    (tmp_path / "other.json").write_text("{}")
    section = gpu_report.markdown_section(tmp_path)
    assert (
        "not measured yet" not in section
        and "Test GPU 80GB, 80 GiB; torch 2.11.0; commit abc" in section
        and "| decode, batch 32" in section
    )
