"""``qvl doctor``: versions, processor, kernels and memory of this machine; what to paste into a report of a fault."""

import argparse
import os
import platform
from collections.abc import Iterator

__all__ = ["add", "run"]

PACKAGES = ("torch", "transformers", "triton", "numpy", "safetensors", "tokenizers", "pillow", "peft", "accelerate")


def add(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    return commands.add_parser("doctor", help="show versions, processor, kernels and memory; for reports of faults")


def run(arguments: argparse.Namespace) -> int:
    """Prints a line per fact; the status is 1 if something keeps qvl from working as it should."""
    wrong: list[str] = []
    for name, value in _facts(wrong):
        print(f"{name + ':':<22}{value}")
    for line in wrong:
        print(f"\nproblem: {line}")
    if not wrong:
        print("\nno problem found")
    return 1 if wrong else 0


def _facts(wrong: list[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of everything; what is wrong is added to ``wrong``."""
    from importlib.metadata import PackageNotFoundError, version

    yield "python", f"{platform.python_version()}, {platform.platform()}"
    for package in ("qvl", *PACKAGES):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield (
        "processor",
        f"{_processor()}, {os.cpu_count()} cores, {len(os.sched_getaffinity(0))} for this process",
    )
    yield "memory", _memory()
    settings = {name: value for name, value in os.environ.items() if name.startswith(("QVL_", "OMP_", "MKL_"))}
    yield "environment", " ".join(f"{name}={value}" for name, value in sorted(settings.items())) or "nothing set"
    try:
        import torch
        import transformers

        import qvl_kernels
        from qvl_model.compat import TESTED_TRANSFORMERS
    except (ImportError, OSError) as error:
        wrong.append(f"qvl cannot be imported: {error}")
        return
    yield "threads", str(torch.get_num_threads())
    yield "kept measurements", _measurements()
    if transformers.__version__ not in TESTED_TRANSFORMERS:
        wrong.append(
            f"transformers {transformers.__version__} is not one that qvl was tested with "
            f"({', '.join(TESTED_TRANSFORMERS)}): a self-check decides at each accelerate"
        )
    for name, found in qvl_kernels.backends().items():
        yield f"backend {name}", "available" if found["available"] else str(found["reason"])
    if qvl_kernels.backends()["cpp"]["available"]:
        info = qvl_kernels.cpu_info()
        yield "instruction set", f"{info['isa']} (supported: {', '.join(info['supported'])})"
        yield "matmuls of prompts", ", ".join(f"{dtype}: {backend}" for dtype, backend in info["gemm_backend"].items())
    else:
        wrong.append(f"the C++ extension does not work: {qvl_kernels.backends()['cpp']['reason']}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            yield f"gpu {i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB"
        yield "cuda", f"{torch.version.cuda or torch.version.hip}"
    else:
        yield "gpu", f"none that PyTorch can use (built for {torch.version.cuda or torch.version.hip or 'CPUs only'})"


def _measurements() -> str:
    from qvl_kernels import config

    found = sorted((config.cache_folder() / "tuning").glob("*.json"))
    return ", ".join(str(file) for file in found) or "none: the first accelerate measures for 0.3 s"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as stream:
            found = dict(line.split(":", 1) for line in stream if ":" in line)
        return next(value.strip() for name, value in found.items() if name.strip() in ("model name", "Model"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES")
    return f"{pages * size / 1e9:.1f} GB, {free * size / 1e9:.1f} GB unused"
