"""Reads compiled kernels: registers, stack, spills and the matrix instructions inside loops, of cubins and AMD
assembly.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Dot", "Instructions", "amd_resources", "dots", "instructions", "nvidia_instructions", "nvidia_resources"]

# Families of matrix instructions, as reports name them.
_NVIDIA_MATRIX = re.compile(r"^(UTC\w*MMA|WARPSPECIALIZED\w*MMA|[HIQBDO]?G?MMA)\b")
_AMD_MATRIX = re.compile(r"^v_s?mfmac?_")
_DOT = re.compile(r"tt\.dot(?:_scaled)? .*: tensor<([\dx]+)x([a-z]\w*)>.*\* tensor<([\dx]+)x([a-z]\w*)>")


@dataclass(frozen=True)
class Dot:
    """One ``tl.dot`` of a kernel in Triton's IR, after inlining."""

    m: int
    n: int
    k: int
    dtype: str
    in_loop: bool


def dots(ttir: str) -> list[Dot]:
    """The dots of a kernel's TTIR; ``in_loop`` when an scf loop surrounds them."""
    found, regions = [], []
    for line in ttir.splitlines():
        text = re.sub(r" loc\(.*\)$", "", line.strip())
        match = _DOT.search(text)
        if match:
            left, right = ([int(size) for size in match[group].split("x")] for group in (1, 3))
            found.append(Dot(left[-2], right[-1], left[-1], match[2], "loop" in regions))
        if text.startswith("}") and regions:
            regions.pop()
        if text.endswith("{"):
            # The body of a while loop follows "} do {".
            regions.append("loop" if "scf.for" in text or "scf.while" in text or text.startswith("} do") else "other")
    return found


@dataclass(frozen=True)
class Instructions:
    """What the machine code does: matrix instructions by family, all and inside loops, and accesses of local memory."""

    matrix: dict[str, int]
    matrix_in_loops: dict[str, int]
    has_loop: bool
    local_loads: int = 0
    local_stores: int = 0


@dataclass
class _Block:
    names: list[str]
    next: list[str]


def _loop_blocks(blocks: dict[str, _Block]) -> set[str]:
    """Labels of the blocks that can reach themselves: those inside loops."""
    inside = set()
    for label, block in blocks.items():
        seen, stack = set(), list(block.next)
        while stack:
            target = stack.pop()
            if target == label:
                inside.add(label)
                break
            if target not in seen and target in blocks:
                seen.add(target)
                stack += blocks[target].next
    return inside


def instructions(
    code: list[tuple[str | None, str, str | None, bool]], family: Callable[[str], str | None]
) -> Instructions:
    """Counts over code as (label or None, instruction, branch target or None, whether the next instruction may follow).

    ``family`` names the matrix family of an instruction, or None. A loop is a set of blocks that can reach themselves;
    a branch to itself alone (the trap at the end of every SASS function) is none.
    """
    blocks: dict[str, _Block] = {}
    current = blocks["entry"] = _Block([], [])
    fresh, falls = 0, True
    for label, name, target, follows in code:
        if label is not None or not falls or (current.names and current.next):
            fresh += 1
            place = label if label is not None else f"block {fresh}"
            following = _Block([], [])
            if falls:
                current.next.append(place)
            current = blocks[place] = following
        if name:
            current.names.append(name)
        falls = follows
        if target is not None:
            current.next.append(target)
    trap = {label for label, block in blocks.items() if block.next == [label] and len(block.names) == 1}
    inside = _loop_blocks(blocks) - trap
    every, looped = {}, {}
    local = {"LDL": 0, "STL": 0}
    for label, block in blocks.items():
        for name in block.names:
            stem = name.split(".")[0]
            local[stem] = local.get(stem, 0) + 1
            matrix = family(name)
            if matrix:
                every[matrix] = every.get(matrix, 0) + 1
                if label in inside:
                    looped[matrix] = looped.get(matrix, 0) + 1
    return Instructions(every, looped, bool(inside), local["LDL"], local["STL"])


_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")
_SASS_LABEL = re.compile(r"^(\.L_\w+):")
_SASS_TARGET = re.compile(r"`\((\.L_\w+)\)")


def _sass(text: str) -> list[tuple[str | None, str, str | None, bool]]:
    code = []
    for line in text.splitlines():
        match = _SASS_LABEL.match(line)
        if match:
            code.append((match[1], "", None, True))
            continue
        match = _SASS.search(line)
        if not match:
            continue
        predicate, name, operands = match[1], match[2], match[3]
        target = _SASS_TARGET.search(operands)
        stem = name.split(".")[0]
        # "BRA.U !UP0, `(.L)" and "BRA P0, `(.L)" carry their condition as an operand.
        conditional = predicate is not None or "," in operands
        ends = not conditional and stem in ("BRA", "EXIT", "RET", "BRX", "JMP")
        code.append((None, name, target[1] if target else None, not ends))
    return code


def nvidia_instructions(sass: str) -> Instructions:
    """Of the text that ``nvdisasm -c`` prints."""

    def family(name: str) -> str | None:
        match = _NVIDIA_MATRIX.match(name)
        return match[1] if match else None

    return instructions(_sass(sass), family)


_AMD_LABEL = re.compile(r"^(\.LBB\w+):")


def amd_instructions(assembly: str) -> Instructions:
    """Of the ``.amdgcn`` text."""
    code = []
    for line in assembly.splitlines():
        match = _AMD_LABEL.match(line)
        if match:
            code.append((match[1], "", None, True))
            continue
        words = line.split(";")[0].split()
        if not line.startswith("\t") or not words or words[0].startswith("."):
            continue
        target = words[1] if len(words) > 1 and words[1].startswith(".LBB") else None
        code.append((None, words[0], target, words[0] not in ("s_branch", "s_endpgm", "s_setpc_b64")))
    return instructions(code, lambda name: "MFMA" if _AMD_MATRIX.match(name) else None)


def _tool(name: str) -> str:
    import triton.backends.nvidia as backend

    return str(Path(backend.__file__).parent / "bin" / name)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True).stdout


def nvidia_resources(cubin: bytes) -> tuple[dict, Instructions]:
    """({"registers", "stack"}, instructions) of a cubin. LOCAL of cuobjdump stays 0 even with spills, so it is not
    read.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    registers = [int(count) for count in re.findall(r"REG:(\d+)", usage)]
    stacks = [int(count) for count in re.findall(r"STACK:(\d+)", usage)]
    if not registers:
        raise ValueError(f"cuobjdump printed no resource usage: {usage!r}")
    return {"registers": max(registers), "stack": max(stacks)}, nvidia_instructions(sass)


def amd_resources(assembly: str) -> tuple[dict, Instructions]:
    """({"registers", "stack", "vgpr_spills", "sgpr_spills"}, instructions) of ``.amdgcn`` text; stack is the private
    segment.
    """

    def field(name: str) -> int:
        match = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if match is None:
            raise ValueError(f".{name} is missing in the assembly's metadata")
        return int(match[1])

    resources = {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "vgpr_spills": field("vgpr_spill_count"),
        "sgpr_spills": field("sgpr_spill_count"),
    }
    return resources, amd_instructions(assembly)
