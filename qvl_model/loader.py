"""Functions for ``from_pretrained`` of the model classes, provided by ``qvl_model.pretrained`` at import.

That module imports the model classes, so they cannot import it.
"""

import os
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["accelerate", "load_quantized", "provide"]

_provided: dict[str, Callable] = {}


def provide(**functions: Callable) -> None:
    _provided.update(functions)


def load_quantized(path: str | os.PathLike, model_class: type, /, **kwargs: Any) -> Any:
    """The accelerated model of a directory of quantised weights, or None for any other."""
    return _provided["load_quantized"](path, model_class, **kwargs)


def accelerate(model: nn.Module) -> Any:
    return _provided["accelerate"](model)
