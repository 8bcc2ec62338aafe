"""Which variants of kernels (``tuning.OFFERED``) are compiled by the audit and measured by the GPU benchmark, beside the plain form."""

from collections.abc import Callable

from qvl_kernels import tuning

__all__ = ["COMBINATIONS", "offered", "using"]

# (op that launches it, kernel, its variants together)
COMBINATIONS = [
    ("attention", "attention", ("DESCRIPTORS",)),
    ("cross_attention", "attention", ("DESCRIPTORS",)),
    ("quantized_linear", "int8_matmul", ("DESCRIPTORS",)),
    ("quantized_linear", "int8_matmul", ("PERSISTENT",)),
    ("quantized_linear", "int8_matmul", ("DESCRIPTORS", "PERSISTENT")),
    ("quantized_linear", "int8_matmul", ("DESCRIPTORS", "PERSISTENT", "WARP_SPECIALIZE")),
    ("linear", "decoding", ("DEPENDENT_LAUNCH",)),
    ("decode_attention", "decoding", ("DEPENDENT_LAUNCH",)),
    ("decode_step", "decoding", ("DEPENDENT_LAUNCH",)),
]


def using(function: Callable, kernel: str, names: tuple[str, ...]) -> Callable:
    """``function`` with these variants of the kernel on."""

    def call(**arguments):
        with tuning.trying(kernel, *names):
            return function(**arguments)

    return call


def offered(op: str, function: Callable, arch: str) -> dict[str, Callable]:
    """Name of a combination -> the op with it, for those that an architecture has.

    Example:
        >>> list(offered("attention", qvl_kernels.attention, "sm_90"))
        ['DESCRIPTORS']
    """
    return {
        "+".join(names): using(function, kernel, names)
        for owner, kernel, names in COMBINATIONS if owner == op and all(arch in tuning.OFFERED[kernel][name] for name in names)
    }  # fmt: skip
