"""Mistakes that a command reports in one line."""

__all__ = ["CommandError", "reading_errors"]


class CommandError(Exception):
    """A mistake of the user: its message is printed, without a traceback."""


def reading_errors() -> tuple[type[Exception], ...]:
    """Errors that a malformed checkpoint file may cause, since transformers checks little of what it reads."""
    from pickle import UnpicklingError

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        RuntimeError,
        ImportError,
        OverflowError,
        RecursionError,
        ZeroDivisionError,
        SafetensorError,
        StrictDataclassError,
        UnpicklingError,
    )
