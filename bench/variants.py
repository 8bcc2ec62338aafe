"""Kernel features (``features.SUPPORTED``) that the compile check compiles and the GPU benchmark measures, beside the
default.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from qvl_kernels.gpu import features

__all__ = ["COMBINATIONS", "offered", "plain", "using"]

# (op that launches it, kernel, features of one combination)
COMBINATIONS = [
    ("attention", "attention", ("DESCRIPTORS",)),
    ("cross_attention", "attention", ("DESCRIPTORS",)),
    ("quantized_linear", "int8_matmul", ("DESCRIPTORS",)),
    ("quantized_linear", "int8_matmul", ("PERSISTENT",)),
    ("quantized_linear", "int8_matmul", ("DESCRIPTORS", "PERSISTENT")),
    ("quantized_linear", "int8_matmul", ("DESCRIPTORS", "PERSISTENT", "WARP_SPECIALIZE")),
    ("linear", "decoding", ("PDL",)),
    ("decode_attention", "decoding", ("PDL",)),
    ("decode_step", "decoding", ("PDL",)),
]


def using(function: Callable, kernel: str, names: tuple[str, ...]) -> Callable:
    """``function`` with these features of the kernel on."""

    def call(**arguments: Any) -> Any:
        with features.override(kernel, *names):
            return function(**arguments)

    return call


def plain(function: Callable) -> Callable:
    """``function`` without any kernel feature."""

    def call(**arguments: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for kernel in features.SUPPORTED:
                stack.enter_context(features.override(kernel))
            return function(**arguments)

    return call


def offered(op: str, function: Callable, arch: str) -> dict[str, Callable]:
    """Name of a combination -> the op with it, for those that an architecture has and that are not on; "plain" where
    one is.

    Example:
        >>> list(offered("attention", qvl_kernels.attention, "sm_100")), list(offered("attention",
        qvl_kernels.attention, "sm_90")) (['DESCRIPTORS'], ['plain'])
    """
    there = [
        (kernel, names)
        for owner, kernel, names in COMBINATIONS
        if owner == op and all(arch in features.SUPPORTED[kernel][name] for name in names)
    ]
    found = {
        "+".join(names): using(function, kernel, names)
        for kernel, names in there
        if kernel == "decoding" or names != features.DEFAULT.get((kernel, arch))
    }
    return found if len(found) == len(there) else {"plain": plain(function), **found}
