"""``qvl run``: another program of Python, in which transformers' Auto classes load Qwen3-VL accelerated."""

import argparse
import importlib.util
import os
import runpy
import sys
import traceback
from collections.abc import Callable

from qvl_model.cli.errors import CommandError

__all__ = ["add", "run"]

EXAMPLES = """examples:
  qvl run lm_eval --model hf-multimodal --model_args pretrained=DIR --tasks mmmu_val
  qvl run script.py ARGUMENTS
  qvl run -m package.module ARGUMENTS

It calls qvl_model.register() first. Processes that the program starts itself, and classes of transformers that it names
instead of an Auto class, are as they were.
"""


def add(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "run",
        help="run a program that loads models through transformers, accelerated",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is a module")
    parser.add_argument("program", metavar="PROGRAM", help="an installed command, or a file that ends in .py")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="what the program takes")
    return parser


def run(arguments: argparse.Namespace) -> int:
    program = arguments.program
    entry = None
    if arguments.module:
        sys.path.insert(0, os.getcwd())
        if not _is_module(program):
            raise CommandError(f"there is no module {program} to run")
    elif program.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
        if not os.path.isfile(program):
            raise CommandError(f"there is no file {program} to run")
    else:
        entry = _installed(program)
    import qvl_model
    from qvl_model import api

    vars(qvl_model).update({name: getattr(api, name) for name in api.__all__})  # which a command leaves out
    try:
        api.register()
    except RuntimeError as error:
        raise CommandError(str(error)) from error
    sys.argv = [program, *arguments.arguments]
    try:
        if arguments.module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        elif entry is None:
            runpy.run_path(program, run_name="__main__")
        else:
            sys.exit(entry())
    except Exception:
        traceback.print_exc()  # the program's own
        return 1
    return 0


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _installed(name: str) -> Callable:
    """The function of an installed command. Raises: CommandError if there is none."""
    from importlib.metadata import entry_points

    found = [entry for entry in entry_points(group="console_scripts") if entry.name == name]
    if not found:
        raise CommandError(
            f"{name} is no command of a package that is installed here; give one, a file that ends in .py, or -m MODULE"
        )
    return found[0].load()
