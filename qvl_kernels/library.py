"""Registration of ops with PyTorch under ``qvl::``."""

from collections.abc import Callable

import torch

__all__ = ["register"]

_LIBRARY = torch.library.Library("qvl", "DEF")


def register(
    schema: str,
    *,
    cpu: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Callable:
    """Registers an op: schema as in ``torch.library``, its CPU kernel, its fake kernel and, if trained, its backward.

    Returns the callable op (``torch.ops.qvl.<name>.default``).
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"qvl::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"qvl::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.qvl, name).default
