"""The parser of the ``qvl`` command, and what is printed when something goes wrong: one line."""

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable

from qvl_model.cli import batch, chat, doctor, generate, inspect, program, quantize, serve, train, verify
from qvl_model.cli.errors import CommandError

__all__ = ["main"]

DEBUG = "show where an error comes from"
COMMANDS = (generate, chat, batch, serve, quantize, inspect, verify, train, program, doctor)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 2 for a mistake in the arguments or files, 1 for a model without
    its full capacity and for what should not happen, 130 after Ctrl-C.

    Example:
        >>> main(["generate", "--image", "digits.png", "--prompt", "Read the digits from left to right."])
    """
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if arguments.debug:
        return arguments.run(arguments) or 0
    if arguments.run is program.run:  # whose warnings are for whoever runs it
        return _guarded(lambda: arguments.run(arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about what users of a command cannot change
        warnings.filterwarnings("default", module=r"qvl_")
        return _guarded(lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qvl", description="Qwen3-VL, accelerated.")
    parser.add_argument("--version", action=_Version)
    parser.add_argument("--debug", action="store_true", help=DEBUG)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for module in COMMANDS:
        added = module.add(commands)
        added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG)
        added.set_defaults(run=module.run)
    return parser


class _Version(argparse.Action):
    """Prints the version, which takes a look at the installed packages, only where it is asked for."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"qvl {version('qvl')}")
        except PackageNotFoundError:
            print("qvl, from a checkout that is not installed")
        parser.exit()


def _guarded(run: Callable[[], int | None]) -> int:
    """The exit status of a command, with one line on stderr for whatever it raises."""
    try:
        return run() or 0
    except CommandError as error:
        return _say(str(error), 2)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:  # who reads the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's own flush does not fail too
        return 141
    except MemoryError:
        return _say("there is not enough memory; a smaller model, int8 weights or smaller images need less", 2)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _say(f"the disk is full ({error.filename or 'writing'})", 2)
        return _say(" ".join(str(error).split()), 2)
    except Exception as error:
        text = " ".join(str(error).split())[:500]
        return _say(f"{type(error).__name__}: {text} (unexpected; --debug shows where, qvl doctor what to report)", 1)


def _say(text: str, status: int) -> int:
    print(f"qvl: {text}", file=sys.stderr)
    return status
