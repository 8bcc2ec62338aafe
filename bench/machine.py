"""What a result was measured on: processor, memory, threads, versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

__all__ = ["commit", "describe", "peak_rss_bytes"]

# The processor features that decide which kernels run.
CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "avx_vnni",
)
PACKAGES = ("torch", "transformers", "numpy", "tokenizers", "safetensors")


def _cpuinfo(field: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    except OSError:
        pass
    return ""


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def commit() -> str:
    """The short name of the checked-out commit, with a note if files differ from it."""
    root = Path(__file__).resolve().parent.parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + (" with local changes" if dirty.stdout.strip() else "")


def describe() -> dict[str, object]:
    """One dictionary that goes into every result file."""
    flags = set(_cpuinfo("flags").split())
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit(),
    }


def peak_rss_bytes() -> int:
    """Peak resident memory of this process.

    From VmHWM: ru_maxrss survives exec, so that a child starts with the peak of the process that spawned it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: peak memory can be measured on Linux only")
