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
from bench.gpu import plan, results, suite
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
        plan.Entry("broken", 1.0, lambda: {}, lambda: 1 // 0),
        plan.Entry("elsewhere", 1.0, lambda: {}, lambda: 1 // 0, "no_such_module"),
    ]
    monkeypatch.setattr(command, "ENTRIES", broken)
    assert command.main([]) == 1
    out = capsys.readouterr().out
    assert (
        "broken: ZeroDivisionError" in out
        and "no GPU: 0 of 1 cases built" in out
        and "elsewhere: left out, no_such_module is not installed" in out
    )
    with pytest.raises(SystemExit):  # names are exact
        command.main(["--case", "brok"])
    assert "no case is called 'brok'" in capsys.readouterr().err


def test_the_order_begins_with_what_was_never_measured():
    names = [entry.name for entry in plan.ENTRIES]
    assert names[0] == "copy" and names[-1] == "GPU tests" and len(set(names)) == len(names)
    order = ["copy", "attention 16k", "linear_cross_entropy", "cross_attention", "generate", "memory stock"]
    order += ["train stock", "decode 32", "decode int8", "swiglu", "GPU tests"]
    assert [name for name in names if name in order] == order


TIMES = {
    "forward": {"ours": _times(1.0), "eager": _times(3.0)},
    "bytes": 2e9,
    "flops": 0.0,
    "errors": {"ours": 0.001, "eager": 0.001},
}


def _passing(**outcomes):
    found = {"a": "passed", **outcomes}
    return suite.merged(None, {"outcomes": found, "failures": {}, "tests": len(found), "crashed": []})


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A GPU that is not there: run(entries, *arguments) -> (status, rows of its result file)."""

    def run(entries, *arguments):
        monkeypatch.setattr(command, "ENTRIES", entries)
        status = command.main(["--output", str(tmp_path), *arguments])
        return status, json.loads((tmp_path / "test-gpu-80gb.json").read_text())["cases"]

    monkeypatch.setattr(command, "probe", lambda: {**_result()["gpu"], "driver": "580.1"})
    monkeypatch.setattr(command, "_build_extension", lambda: {"built": False})
    return run


def test_a_run_writes_after_every_case_and_survives_bad_ones(tmp_path, machine, capsys):
    def last():
        """Reads the file that the earlier cases wrote."""
        return {"seen": sorted(json.loads((tmp_path / "test-gpu-80gb.json").read_text())["cases"])}

    entries = [
        plan.Entry("copy", 20.0, lambda: {"gb_s": 2500.0, "milliseconds": _times(1.0)}, dict),
        plan.Entry("swiglu", 20.0, lambda: TIMES, dict, compile=lambda: (tmp_path / "compiled").touch()),
        plan.Entry("elsewhere", 20.0, dict, dict, "no_such_module"),
        plan.Entry("hangs", 0.5, lambda: time.sleep(60), dict),
        plan.Entry("fails", 20.0, lambda: 1 // 0, dict),
        plan.Entry("last", 20.0, last, dict),
        plan.Entry("GPU tests", 20.0, lambda: {**_passing(), "failed": 1}, dict),
    ]
    status, cases = machine(entries)
    assert status == 1  # a GPU test failed
    assert cases["last"]["value"]["seen"] == sorted(entry.name for entry in entries[:-2])
    assert "longer than" in cases["hangs"]["error"] and "not installed" in cases["elsewhere"]["error"]
    assert list(cases)[-1] == "GPU tests" and (tmp_path / "compiled").exists()
    assert (tmp_path / "test-gpu-80gb.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert (
        "1 passed, 1 failed" in out
        and "80 % of copy" in out
        and "eager 3.00×" in out
        and "fails: ZeroDivisionError" in out
    )
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert {line["case"] for line in lines} == set(cases) and all("key" in line for line in lines)
    assert not list(tmp_path.glob("*.new"))


def test_runs_are_merged(tmp_path, machine, monkeypatch, capsys):
    """What was measured is not measured again; what the time did not allow comes in the next run."""
    ran = tmp_path / "ran"
    entries = [
        plan.Entry(name, 20.0, lambda name=name: (ran.write_text(f"{ran.read_text()}{name} "), TIMES)[1], dict)
        for name in ("layer_norm", "swiglu", "rms_norm")
    ]
    ran.write_text("")
    _, cases = machine(entries, "--minutes", "0")
    assert all("the time was up" in case["error"] for case in cases.values()) and ran.read_text() == ""
    assert machine(entries, "--case", "swiglu")[0] == 0 and ran.read_text() == "swiglu "
    _, cases = machine(entries)
    assert ran.read_text() == "swiglu layer_norm rms_norm " and all("value" in case for case in cases.values())
    assert all(0 <= case["seconds"] < 20 for case in cases.values())
    capsys.readouterr()
    machine(entries)
    assert (
        ran.read_text() == "swiglu layer_norm rms_norm "
        and "3 of 3 cases are measured already" in capsys.readouterr().out
    )
    monkeypatch.setattr(results, "source_hash", lambda: "another")
    machine(entries, "--minutes", "0")  # no value is lost to "the time was up"
    status, cases = machine(entries, "--case", "layer_norm")
    assert ran.read_text() == "swiglu layer_norm rms_norm layer_norm " and "value" in cases["swiglu"]
    assert cases["layer_norm"]["key"]["source"] == "another" != cases["swiglu"]["key"]["source"]
    machine(entries, "--fresh", "--case", "swiglu")
    assert ran.read_text() == "swiglu layer_norm rms_norm layer_norm swiglu "
    assert list(json.loads((tmp_path / "test-gpu-80gb.json").read_text())["cases"]) == ["swiglu"]


def test_an_error_does_not_take_the_place_of_a_value(tmp_path, machine, monkeypatch):
    assert "value" in machine([plan.Entry("layer_norm", 20.0, lambda: TIMES, dict)])[1]["layer_norm"]
    monkeypatch.setattr(results, "source_hash", lambda: "another")
    _, cases = machine([plan.Entry("layer_norm", 20.0, lambda: 1 // 0, dict)])
    assert cases["layer_norm"]["value"] == TIMES and cases["layer_norm"]["key"]["source"] != "another"


def test_rows_of_an_older_commit_are_named():
    result = _result(copy={"gb_s": 2.0, "milliseconds": _times(1.0)})
    assert not gpu_report.problems(result)
    result["cases"]["copy"]["commit"] = "older"
    assert gpu_report.problems(result) == ["copy: measured at commit older"]


def test_the_plan(machine, capsys):
    entries = [
        plan.Entry("layer_norm", 20.0, lambda: TIMES, dict),
        plan.Entry("swiglu", 30.0, lambda: TIMES, dict),
        plan.Entry("elsewhere", 20.0, dict, dict, "no_such_module"),
        plan.Entry("rms_norm", 40.0, lambda: TIMES, dict),
    ]
    machine(entries, "--case", "layer_norm")
    capsys.readouterr()
    machine(entries, "--dry-run", "--minutes", "0.4")
    assert capsys.readouterr().out.splitlines() == [
        "layer_norm: measured",
        "swiglu: command 1, at most 30 s",
        "elsewhere: left out, no_such_module is not installed",
        "rms_norm: command 2, at most 40 s",
        "2 of 4 cases to measure, in about 2 commands of 0.4 minutes",
    ]


def test_time_counts_from_the_start_of_make(monkeypatch):
    monkeypatch.setenv(command.START, str(time.time() - 100))
    assert command._start() == pytest.approx(time.monotonic() - 100, abs=2)
    for odd in ("", "x", str(time.time() - 1e6), str(time.time() + 500)):
        monkeypatch.setenv(command.START, odd)
        assert command._start() == pytest.approx(time.monotonic(), abs=2)


def test_the_source_hash_follows_what_rows_depend_on(tmp_path):
    for name in ("qvl_kernels/a.py", "qvl_model/cli/b.py", "bench/gpu/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    before = results.source_hash(tmp_path)
    (tmp_path / "qvl_model/cli/b.py").write_text("2")
    assert results.source_hash(tmp_path) == before
    (tmp_path / "qvl_kernels/a.py").write_text("2")
    assert results.source_hash(tmp_path) != before


def test_where_ours_fails_the_others_stay(monkeypatch):
    import qvl_kernels

    def broken(**_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(qvl_kernels, "patch_embed", broken)
    value = gpu_kernels.run(gpu_kernels._patch_embed(4, 32), CPU, seconds=1e-9)
    assert value["unavailable"] == {"ours": "RuntimeError: no kernel"} and "conv3d" in value["forward"]
    assert not any(item.value({"patch_embed": value}) for item in TARGETS)
    assert gpu_report.problems(_result(patch_embed=value)) == ["patch embed: without ours (RuntimeError: no kernel)"]


TESTS = (
    "import pytest\n\n@pytest.mark.parametrize('i', range(7))\ndef test_i(i):\n    assert i != 3\n\n"
    "def test_skipped():\n    pytest.skip('so')\n"
)


def test_gpu_tests_are_run_in_parts(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    whole = suite.merged(None, suite.run(".", root=tmp_path, jobs=2))
    assert [whole[key] for key in ("passed", "failed", "skipped", "not_run", "crashed")] == [6, 1, 1, 0, []]
    bad = "test_some.py::test_i[3]"
    assert [*whole["failures"]] == [bad] and "assert 3 != 3" in whole["failures"][bad]
    first = suite.merged(None, suite.run(".", root=tmp_path, jobs=1, part=(1, 2)))
    assert first["not_run"] == 4 and len(first["outcomes"]) == 4
    both = suite.merged(first, suite.run(".", root=tmp_path, jobs=1, part=(2, 2)))
    assert both["outcomes"] == whole["outcomes"] and both["not_run"] == 0
    (tmp_path / "test_some.py").write_text(TESTS.replace("i != 3", "i != 9"))
    passed = [test for test, outcome in both["outcomes"].items() if outcome != "failed"]
    again = suite.run(".", root=tmp_path, jobs=1, done=passed)
    assert [*again["outcomes"]] == [bad]
    assert suite.merged(both, again)["failures"] == {} and suite.merged(both, again)["passed"] == 7
    with pytest.raises(RuntimeError, match="no tests"):
        suite.run("nothing", root=tmp_path)


def test_gpu_tests_stop_in_time(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import time\n\ndef test_quick():\n    pass\n\ndef test_slow():\n    time.sleep(60)\n"
    )
    value = suite.merged(None, suite.run(".", root=tmp_path, jobs=1, seconds=10.0))
    assert (value["failed"], value["crashed"]) == (0, []) and value["passed"] + value["not_run"] == 2
    assert value["not_run"]


def test_an_interrupt_while_pytest_starts_is_no_crash(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "import sys, time\n\nif '--collect-only' not in sys.argv:\n    time.sleep(60)\n"
    )
    (tmp_path / "test_some.py").write_text("def test_quick():\n    pass\n")
    value = suite.merged(None, suite.run(".", root=tmp_path, jobs=1, seconds=10.0))
    assert (value["failed"], value["crashed"], value["not_run"]) == (0, [], 1)


def test_tests_that_passed_are_not_run_again(tmp_path, machine, monkeypatch):
    """Each part adds its outcomes to the row."""
    asked = tmp_path / "asked"

    def run(*, part, done, seconds):
        asked.write_text(f"{asked.read_text()}{part} {done}\n")
        outcomes = {"b": "passed"} if done else {"a": "passed"}
        return {"outcomes": outcomes, "failures": {}, "tests": 2, "crashed": []}

    asked.write_text("")
    monkeypatch.setattr(suite, "run", run)
    entries = [plan.Entry("GPU tests", 20.0, run, dict)]
    for options in (["--tests", "1/2"], ["--tests", "2/2"], []):
        status, cases = machine(entries, *options)
    assert status == 0 and cases["GPU tests"]["value"]["passed"] == 2 and cases["GPU tests"]["value"]["not_run"] == 0
    assert asked.read_text() == "(1, 2) []\n(2, 2) ['a']\n"
    for odd in ("0/2", "3/2", "x", "1/"):
        with pytest.raises(SystemExit):
            machine(entries, "--tests", odd)


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
