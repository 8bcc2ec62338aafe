"""Violations of the audit that are accepted, each with its reason. Nothing else may spill or miss its matrix instructions."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["WAIVABLE", "WAIVERS", "Waiver"]

# What does not fit into the chip or does not compile cannot run, so no waiver helps it.
WAIVABLE = ("spill", "matrix")


@dataclass(frozen=True)
class Waiver:
    """Accepts one kind of violation of a kernel on an architecture in a dtype. Names may hold * as in file names.

    ``triton`` limits it to versions that begin so: spills come and go with the compiler.
    """

    kernel: str
    arch: str
    dtype: str
    kind: str
    reason: str
    triton: str = ""

    def covers(self, kernel: str, arch: str, dtype: str, kind: str, triton: str) -> bool:
        """Whether it accepts violations of that kind there.

        Example:
            >>> Waiver("_a_kernel", "sm_*", "fp32", "spill", "because").covers("_a_kernel", "sm_80", "fp32", "spill", "3.9.0")
            True
        """
        return (
            kind == self.kind and kind in WAIVABLE and triton.startswith(self.triton) and fnmatchcase(kernel, self.kernel)
            and fnmatchcase(arch, self.arch) and fnmatchcase(dtype, self.dtype)
        )  # fmt: skip


WAIVERS: list[Waiver] = []
