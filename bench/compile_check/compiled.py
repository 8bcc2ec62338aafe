"""Compiles specialisations, each in its own process, and lists violations in the machine code."""

import functools
from collections.abc import Callable, Iterator

import triton

from bench.compile_check import sass
from bench.compile_check.chips import resident_warps
from bench.compile_check.launches import Specialisation, target
from bench.isolated import run_all
from qvl_kernels.gpu.device import SHARED_MEMORY

__all__ = ["compile_all", "inspect", "violations"]

TENSOR_MEMORY = 512  # columns of tensor memory of an sm_100 SM
WIDE = 64  # M from which a 16-bit matmul must use the warp-group (sm_90) or tensor-memory (sm_100) instructions


def inspect(specialisation: Specialisation) -> dict:
    """Compiles for the specialisation's architecture and reads the machine code. Needs no GPU."""
    arch = specialisation.arch
    compiled = triton.compile(specialisation.source, target=target(arch), options=specialisation.options)
    metadata = compiled.metadata
    if arch.startswith("sm_"):
        resources, code = sass.nvidia_resources(compiled.asm["cubin"])
    else:
        resources, code = sass.amd_resources(compiled.asm["amdgcn"])
    return {
        **resources,
        "local_loads": code.local_loads,
        "local_stores": code.local_stores,
        "shared": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
        "warps": metadata.num_warps,
        "stages": getattr(metadata, "num_stages", None),
        "resident_warps": resident_warps(arch, resources["registers"], metadata.shared, metadata.num_warps),
        "matrix": code.matrix,
        "matrix_in_loops": code.matrix_in_loops,
        "has_loop": code.has_loop,
        "dots": [vars(dot) for dot in sass.dots(compiled.asm["ttir"])],
    }


def _family(arch: str, dot: dict) -> str | None:
    """The matrix instructions that a dot must become, or None where any will do (fp32 in full precision has none on
    NVIDIA).
    """
    wide = dot["m"] >= WIDE
    if dot["dtype"] in ("f16", "bf16"):
        return {"sm_90": "HGMMA" if wide else "HMMA", "sm_100": "UTCHMMA" if wide else "HMMA", "gfx942": "MFMA"}.get(
            arch, "HMMA"
        )
    if dot["dtype"] == "i8":
        return {"sm_90": "IGMMA" if wide else "IMMA", "sm_100": "UTCIMMA" if wide else "IMMA", "gfx942": "MFMA"}.get(
            arch, "IMMA"
        )
    return None


def violations(arch: str, found: dict) -> list[tuple[str, str]]:
    """(kind, sentence) of every violation in what ``inspect`` found."""
    wrong = []
    for name, label in (
        ("stack", "bytes of stack"),
        ("local_loads", "LDL"),
        ("local_stores", "STL"),
        ("vgpr_spills", "VGPR spills"),
        ("sgpr_spills", "SGPR spills"),
    ):
        if found.get(name):
            wrong.append(("spill", f"{found[name]} {label}"))
    if found["shared"] > SHARED_MEMORY[arch]:
        wrong.append(("shared", f"{found['shared']} bytes of shared memory, the limit is {SHARED_MEMORY[arch]}"))
    if found["tensor_memory"] > TENSOR_MEMORY:
        wrong.append(("shared", f"{found['tensor_memory']} columns of tensor memory, the limit is {TENSOR_MEMORY}"))
    if found["resident_warps"] == 0 and found["shared"] <= SHARED_MEMORY[arch]:
        wrong.append(
            (
                "registers",
                f"a block of {found['warps']} warps with {found['registers']} registers a thread does not fit",
            )
        )
    expected = {(family, dot["in_loop"]) for dot in found["dots"] if (family := _family(arch, dot)) is not None}
    for family, in_loop in sorted(expected):
        looped = in_loop and found["has_loop"]  # without a loop the compiler unrolled it all
        if not found["matrix_in_loops" if looped else "matrix"].get(family):
            present = (
                ", ".join(f"{count} {name}" for name, count in found["matrix"].items())
                or "no matrix instruction at all"
            )
            wrong.append(("matrix", f"no {family} in {'the loop' if looped else 'the kernel'}: {present}"))
    return wrong


def compile_all(
    specialisations: list[Specialisation], *, jobs: int, timeout: float = 300.0, tick: Callable[[], None] = lambda: None
) -> Iterator[tuple[Specialisation, dict]]:
    """(specialisation, what ``inspect`` found or {"error": text}) in order of completion.

    Each compilation is a process of its own: an assertion inside the compiler ends that one alone.
    """
    tasks = ((index, functools.partial(inspect, item), timeout) for index, item in enumerate(specialisations))
    for index, answer in run_all(tasks, jobs=jobs, tick=tick):
        if "error" in answer:
            error = (
                answer["error"] if "exit code" not in answer["error"] else f"{answer['error']}: {answer['log'][-300:]}"
            )
            yield specialisations[index], {"error": error}
        else:
            yield specialisations[index], answer["value"]
