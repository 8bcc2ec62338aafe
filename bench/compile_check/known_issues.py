"""Known issues (allowlist) of the compile check, each with its reason. Nothing else may spill or miss its matrix
instructions.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["ACCEPTABLE", "KNOWN_ISSUES", "KnownIssue"]

# Kernels that do not fit or do not compile cannot run, so only these kinds can be accepted.
ACCEPTABLE = ("spill", "matrix")


@dataclass(frozen=True)
class KnownIssue:
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
            >>> issue = KnownIssue("_a_kernel", "sm_*", "fp32", "spill", "because")
            >>> issue.covers("_a_kernel", "sm_80", "fp32", "spill", "3.9.0")
            True
        """
        return (
            kind == self.kind
            and kind in ACCEPTABLE
            and triton.startswith(self.triton)
            and fnmatchcase(kernel, self.kernel)
            and fnmatchcase(arch, self.arch)
            and fnmatchcase(dtype, self.dtype)
        )


# Tiles and warps are chosen for Triton 3.9, with which almost nothing spills (see below). 3.6 allocates registers
# differently: so many bytes of stack there (gfx942: spilled registers), mostly outside the loops. The kernels are
# right, and a little slower than they could be.
_SPILLS_WITH_3_6 = [
    ("_attention_kernel", "sm_80", "fp32", "8 bytes"),
    ("_attention_kernel", "gfx942", "bf16", "2 scalar registers"),
    ("_attention_backward_queries_kernel", "sm_80", "fp32", "16 bytes"),
    ("_attention_backward_queries_kernel", "gfx942", "bf16", "3 scalar registers"),
    ("_attention_backward_keys_kernel", "sm_80", "bf16", "16 to 72 bytes"),
    ("_attention_backward_queries_kernel", "sm_90", "bf16", "8 bytes"),
    ("_attention_backward_queries_kernel", "sm_90", "fp16", "8 bytes"),
    ("_attention_backward_keys_kernel", "sm_90", "bf16", "24 to 56 bytes"),
    ("_attention_backward_keys_kernel", "sm_90", "fp16", "24 to 56 bytes"),
    ("_attention_backward_keys_kernel", "sm_100", "bf16", "40 to 80 bytes"),
    ("_attention_backward_keys_kernel", "gfx942", "bf16", "9 to 26 registers"),
    ("_rms_norm_backward_kernel", "sm_100", "bf16", "8 bytes"),
    ("_gemv_dot_kernel", "sm_80", "bf16", "8 bytes"),
    ("_gemv_dot_kernel", "sm_80", "fp32", "240 bytes: int4 weights with fp32 activations"),
    ("_gemv_fma_kernel", "sm_100", "bf16", "32 bytes"),
    ("_gemv_int4_kernel", "sm_100", "bf16", "24 bytes"),
    ("_gemv_int4_kernel", "sm_90", "bf16", "24 bytes: gate and up with zero-points"),
    ("_gemv_int4_kernel", "sm_90", "fp16", "24 bytes: gate and up with zero-points"),
]
KNOWN_ISSUES = [
    KnownIssue(kernel, arch, dtype, "spill", f"tuned for Triton 3.9; with 3.6 {much}", triton="3.6")
    for kernel, arch, dtype, much in _SPILLS_WITH_3_6
]
KNOWN_ISSUES += [
    KnownIssue(
        "_attention_backward_keys_kernel",
        "sm_90",
        dtype,
        "spill",
        "16 to 32 bytes of tiles that an H100 runs faster than those without spills",
        triton="3.9",
    )
    for dtype in ("bf16", "fp16")
]
KNOWN_ISSUES += [
    KnownIssue(
        f"_attention_{kernel}",
        "gfx942",
        "bf16",
        "spill",
        f"{count} scalar registers are kept in lanes of a vector register, one instruction each",
        triton="3.9",
    )
    for kernel, count in (("kernel", "4 to 6"), ("backward_queries_kernel", "2"), ("backward_keys_kernel", "4 to 8"))
]
KNOWN_ISSUES.append(
    KnownIssue(
        "_int8_matmul_kernel", "sm_100", "bf16", "matrix", "Triton 3.6 makes IMMA of it, not tcgen05", triton="3.6"
    )
)
