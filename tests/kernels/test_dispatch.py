"""Dispatch: choice of backend, forced backends, fallbacks, GPUs without kernels, and hidden installations."""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import qvl_kernels
from qvl_kernels import dispatch
from qvl_kernels.gpu import device as gpu_device

ROOT = Path(qvl_kernels.__file__).parents[1]


def _python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python in a process of its own with these variables set."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("QVL_")}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**variables, **environment},
        timeout=120,
        cwd=cwd,
    )


NORM = "import torch, qvl_kernels\nprint(qvl_kernels.rms_norm(torch.ones(2, 8), torch.ones(8)).sum().round().item())"


@pytest.fixture
def no_fallbacks(monkeypatch):
    monkeypatch.setattr(dispatch, "_fallbacks", {})


def test_backends():
    found = qvl_kernels.backends()
    assert list(found) == ["reference", "cpp", "triton"]
    assert found["reference"] == {"available": True, "reason": None}
    assert found["cpp"] == {"available": True, "reason": None}
    assert not found["triton"]["available"] and found["triton"]["reason"]


def test_use_backend_nests_and_restores(monkeypatch):
    monkeypatch.setattr(dispatch, "_forced", None)
    cpu = torch.device("cpu")
    assert dispatch.choose("op", cpu) == "cpp"
    with qvl_kernels.use_backend("reference"):
        assert dispatch.choose("op", cpu) == "reference"
        with qvl_kernels.use_backend("cpp"):
            assert dispatch.choose("op", cpu) == "cpp"
        assert dispatch.choose("op", cpu) == "reference"
    with pytest.raises(ZeroDivisionError), qvl_kernels.use_backend("reference"):
        raise ZeroDivisionError
    assert dispatch.choose("op", cpu) == "cpp"


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of reference, cpp, triton"):
        with qvl_kernels.use_backend("cuda"):
            pass


def test_forced_backend_never_falls_back(no_fallbacks):
    x = torch.ones(2, 8, dtype=torch.float64)
    with qvl_kernels.use_backend("cpp"), pytest.raises(RuntimeError, match="'cpp' was forced.*float64"):
        qvl_kernels.rms_norm(x, x[0])
    with qvl_kernels.use_backend("cpp"), pytest.raises(RuntimeError, match="'cpp' was forced.*meta tensors"):
        qvl_kernels.rms_norm(x.float().to("meta"), x[0].float().to("meta"))
    with qvl_kernels.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was forced"):
        qvl_kernels.rms_norm(x.float(), x[0].float())
    assert qvl_kernels.fallbacks() == []


def test_unsupported_cases_fall_back_with_one_warning_each(no_fallbacks):
    x = torch.ones(2, 8, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="rms_norm runs on the reference backend: dtype torch.float64") as caught:
        qvl_kernels.rms_norm(x, x[0])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qvl_kernels.rms_norm(x, x[0])  # said once
        with pytest.raises(RuntimeWarning, match="swiglu"):
            qvl_kernels.swiglu(x, x)
    names = [case.split(":")[0] for case in qvl_kernels.fallbacks()]
    assert names == ["rms_norm", "swiglu"]


def _gpus(monkeypatch, capabilities: list[tuple[int, int]], probe) -> None:
    """GPUs of these compute capabilities; ``probe`` takes the place of a kernel launch."""
    from qvl_kernels.gpu import probe as gpu_probe

    monkeypatch.setattr(gpu_device, "version", lambda package: "3.6.0")  # an older PyTorch brings an older Triton
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(gpu_probe, "probe", probe)
    for function in ("_without_triton", "_unrunnable"):
        monkeypatch.setattr(gpu_device, function, functools.cache(getattr(gpu_device, function).__wrapped__))


@pytest.mark.parametrize(
    ("capability", "error", "reason"),
    [
        ((7, 5), None, "the GPU is sm_75; the kernels need sm_80"),
        ((9, 0), None, None),
        (
            (9, 0),
            RuntimeError("Failed to find C compiler"),
            "Triton cannot run a kernel here .RuntimeError: Failed to find C compiler",
        ),
    ],
    ids=["old", "good", "no compiler"],
)
def test_gpus_that_cannot_run_the_kernels(capability, error, reason, monkeypatch):
    """One warning, then stock code runs."""
    from qvl_model.modules import fast_path

    def probe(device):
        if error is not None:
            raise error

    class OnGpu:
        is_cpu, is_cuda, device, dtype = (
            False,
            True,
            torch.device("cuda", 0),
            torch.float64,
        )  # no kernel takes this dtype, so nothing else of the tensor is checked

    _gpus(monkeypatch, [capability], probe)
    monkeypatch.setattr(fast_path, "_say_once", functools.cache(fast_path._say_once.__wrapped__))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert not fast_path.kernels_take(OnGpu())
    assert (gpu_device.unavailable() is None) == (reason is None)
    assert len(caught) == (reason is not None)
    if reason is not None:
        assert re.search(reason, str(caught[0].message)) and "stock code" in str(caught[0].message)


def test_every_gpu_is_asked_for_itself(monkeypatch):
    _gpus(monkeypatch, [(7, 5), (9, 0)], lambda device: None)
    old, new = (gpu_device.unavailable(torch.device("cuda", index)) for index in (0, 1))
    assert "sm_75" in old and new is None and gpu_device.unavailable() == old  # the current one is 0


def test_a_trace_does_not_decide_for_later(monkeypatch):
    """While PyTorch traces, nothing may be launched, so the probe's result is not kept."""
    probed = []

    def probe(device):
        probed.append(device)
        raise RuntimeError("no compiler")

    _gpus(monkeypatch, [(9, 0)], probe)
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert gpu_device.unavailable() is None and not probed
    assert "no compiler" in gpu_device.unavailable() and len(probed) == 1


def test_cpu_info():
    info = qvl_kernels.cpu_info()
    assert "portable" in info["supported"]
    if not os.environ.get("QVL_CPU_ISA"):
        assert info["isa"] == info["supported"][-1] != "amx_emulated"  # the best one, and none that is for tests only
    assert set(info["gemm_backend"]) == {"fp32", "bf16", "fp16"} and set(info["gemm_backend"].values()) <= {
        "fma",
        "dot",
    }
    assert info["threads"] == torch.get_num_threads()


def test_backend_variable():
    forced = "import torch, qvl_kernels\nprint(qvl_kernels.dispatch.choose('op', torch.device('cpu')))"
    assert _python("-c", forced, QVL_BACKEND="reference").stdout.strip() == "reference"
    unknown = _python("-c", NORM, QVL_BACKEND="fast")
    assert unknown.returncode != 0
    assert "ValueError: unknown backend 'fast'; choose one of reference, cpp, triton" in unknown.stderr


def test_missing_extension_names_the_command_that_builds_it():
    hidden = "import sys\nsys.modules['qvl_kernels._C'] = None\n"
    missing = _python("-c", hidden + NORM)
    assert missing.returncode != 0
    assert "RuntimeError: qvl_kernels: the C++ extension" in missing.stderr
    assert "build it with: pip install -e ." in missing.stderr
    listed = _python("-c", hidden + "import qvl_kernels\nprint(qvl_kernels.backends()['cpp'])")
    assert "'available': False" in listed.stdout and "pip install" in listed.stdout
    assert _python("-c", hidden + NORM, QVL_BACKEND="reference").stdout.strip() == "16.0"


@pytest.fixture(scope="module")
def installed_and_checkout(tmp_path_factory):
    """Folders with the packages: as installed, and as a checkout in which nothing has been built."""
    folders = tmp_path_factory.mktemp("site-packages"), tmp_path_factory.mktemp("checkout")
    for folder, left_out in zip(folders, (["digits"], ["digits", "_C*"])):
        for package in ("qvl_kernels", "qvl_model"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", *left_out))
    return folders


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import qvl_kernels"),
        ("-c", "import qvl_model"),
        ("-m", "qvl_model.cli", "--debug", "inspect", str(ROOT / "qvl_model/digits/checkpoint")),
    ],
    ids=["qvl_kernels", "qvl_model", "inspect"],
)
def test_a_checkout_that_hides_an_installed_package_says_so(arguments, installed_and_checkout):
    """The installed extension is not loaded: even at the same version its sources may differ."""
    installed, checkout = installed_and_checkout
    result = _python(*arguments, cwd=checkout, PYTHONPATH=str(installed))
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert last == (
        f"ImportError: {checkout / 'qvl_kernels'} has no built extension and hides the qvl_kernels installed in "
        f"{installed}: run Python from "
        f"another folder (and without {checkout} in PYTHONPATH), or build the extension there: python setup.py "
        f"build_ext --inplace"
    )
    assert "circular" not in result.stderr and "During handling" not in result.stderr


def test_both_ways_out_of_a_hidden_package(installed_and_checkout, tmp_path):
    installed, checkout = installed_and_checkout
    where = "import qvl_kernels; print(qvl_kernels.cpu_info()['isa'], qvl_kernels.__file__)"
    assert str(installed) in _python("-c", where, cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    shutil.copytree(checkout / "qvl_kernels", tmp_path / "qvl_kernels")
    for extension in installed.glob("qvl_kernels/_C*"):
        shutil.copy(extension, tmp_path / "qvl_kernels")
    assert str(tmp_path) in _python("-c", where, cwd=tmp_path, PYTHONPATH=str(installed)).stdout


def test_every_gpu_has_an_audited_architecture():
    """RTX 30 has the shared memory of RTX 40, Jetson Orin that of A100, B300 and Thor the tensor memory of B200;
    unknown GPUs get the smallest tiles.
    """
    known = {
        "sm_86": "sm_89",
        "sm_87": "sm_80",
        "sm_103": "sm_100",
        "sm_110": "sm_100",
        "sm_121": "sm_120",
        "sm_130": "sm_89",
        "gfx90a": "gfx942",
        "gfx950": "gfx942",
    }
    assert {name: gpu_device.nearest(name) for name in known} == known
    assert all(gpu_device.nearest(name) == name for name in gpu_device.ARCHITECTURES)
