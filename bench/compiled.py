"""Compiles specialisations in processes of their own and says what is wrong with what comes out."""

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator

import triton

from bench import sass
from bench.chips import LIMITS, resident_warps
from bench.launches import Specialisation, target
from qvl_kernels.tuning import SHARED_MEMORY

__all__ = ["compile_all", "inspect", "violations"]

TENSOR_MEMORY = 512  # columns of an sm_100 multiprocessor
WIDE = 64  # rows from which a 16-bit product must use the warp-group (sm_90) or tensor-memory (sm_100) instructions


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
        "local_loads": code.local_loads, "local_stores": code.local_stores,
        "shared": metadata.shared, "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
        "warps": metadata.num_warps, "stages": getattr(metadata, "num_stages", None),
        "resident_warps": resident_warps(arch, resources["registers"], metadata.shared, metadata.num_warps),
        "matrix": code.matrix, "matrix_in_loops": code.matrix_in_loops, "has_loop": code.has_loop,
        "dots": [vars(dot) for dot in sass.dots(compiled.asm["ttir"])],
    }  # fmt: skip


def _family(arch: str, dot: dict) -> str | None:
    """The matrix instructions that a dot must become, or None where any will do (fp32 in full precision has none on NVIDIA)."""
    wide = dot["m"] >= WIDE
    if dot["dtype"] in ("f16", "bf16"):
        return {"sm_90": "HGMMA" if wide else "HMMA", "sm_100": "UTCHMMA" if wide else "HMMA", "gfx942": "MFMA"}.get(arch, "HMMA")
    if dot["dtype"] == "i8":
        return {"sm_90": "IGMMA" if wide else "IMMA", "sm_100": "UTCIMMA" if wide else "IMMA", "gfx942": "MFMA"}.get(arch, "IMMA")
    return None


def violations(arch: str, found: dict) -> list[tuple[str, str]]:
    """(kind, sentence) for everything that must not be, of what ``inspect`` found."""
    wrong = []
    for name, label in (("stack", "bytes of stack"), ("local_loads", "LDL"), ("local_stores", "STL"), ("vgpr_spills", "VGPR spills"),
                        ("sgpr_spills", "SGPR spills")):  # fmt: skip
        if found.get(name):
            wrong.append(("spill", f"{found[name]} {label}"))
    if found["shared"] > SHARED_MEMORY[arch]:
        wrong.append(("shared", f"{found['shared']} bytes of shared memory, the limit is {SHARED_MEMORY[arch]}"))
    if found["tensor_memory"] > TENSOR_MEMORY:
        wrong.append(("shared", f"{found['tensor_memory']} columns of tensor memory, the limit is {TENSOR_MEMORY}"))
    if found["resident_warps"] == 0 and found["shared"] <= SHARED_MEMORY[arch]:
        wrong.append(("registers", f"a block of {found['warps']} warps with {found['registers']} registers a thread does not fit"))
    expected = {(family, dot["in_loop"]) for dot in found["dots"] if (family := _family(arch, dot)) is not None}
    for family, in_loop in sorted(expected):
        looped = in_loop and found["has_loop"]  # without a loop the compiler unrolled it all
        if not found["matrix_in_loops" if looped else "matrix"].get(family):
            present = ", ".join(f"{count} {name}" for name, count in found["matrix"].items()) or "no matrix instruction at all"
            wrong.append(("matrix", f"no {family} in {'the loop' if looped else 'the kernel'}: {present}"))
    return wrong


def _child(specialisation: Specialisation, connection, log) -> None:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        connection.send(inspect(specialisation))
    except Exception as error:  # becomes a violation
        connection.send({"error": f"{type(error).__name__}: {error}" or traceback.format_exc()})
    connection.close()
    os._exit(0)


def compile_all(
    specialisations: list[Specialisation], *, jobs: int, timeout: float = 300.0, tick: Callable[[], None] = lambda: None
) -> Iterator[tuple[Specialisation, dict]]:
    """(specialisation, what ``inspect`` found or {"error": text}) in order of completion.

    Each compilation is forked off: an assertion inside the compiler ends that process alone.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(specialisations)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            item = waiting.pop()
            receive, send = context.Pipe(duplex=False)
            log = tempfile.TemporaryFile("w+")
            process = context.Process(target=_child, args=(item, send, log), daemon=True)
            process.start()
            send.close()
            running[receive] = (item, process, log, time.monotonic() + timeout)
        ready = multiprocessing.connection.wait(list(running), timeout=0.2)
        tick()
        late = [connection for connection, (*_, deadline) in running.items() if connection not in ready and time.monotonic() > deadline]
        for connection in late:
            running[connection][1].kill()
        for connection in [*ready, *late]:
            item, process, log, _ = running.pop(connection)
            try:
                found = {"error": f"took longer than {timeout:.0f} s"} if connection in late else connection.recv()
            except EOFError:
                process.join()
                log.seek(0)
                found = {"error": f"the compiler ended with exit code {process.exitcode}: {log.read()[-300:].strip()}"}
            process.join()
            connection.close()
            log.close()
            yield item, found
