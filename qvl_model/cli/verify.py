"""``qvl verify``: that a checkpoint has every layer, head, channel and parameter of its architecture."""

import argparse

from qvl_model.cli import models
from qvl_model.cli.errors import CommandError

__all__ = ["add", "run"]


def add(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "verify", help="check that no layer, head, channel or parameter of a checkpoint is missing or pruned"
    )
    parser.add_argument("model", metavar="MODEL", help=models.HELP)
    parser.add_argument(
        "--spec",
        metavar="SPEC",
        help="what it must be: a name (qwen3-vl-2b, -4b, -8b, -32b, qvl-2b), or another model, of which config.json "
        "is read (default: its own)",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    from qvl_model import api, capacity  # noqa: F401  api registers QVL
    from qvl_model.checkpoint_files import one_line

    checkpoint = models.checkpoint_of(arguments.model)
    config = models.config_of(checkpoint)
    spec, name = config, f"{checkpoint}/config.json"
    if arguments.spec in capacity.SPECS:
        spec, name = capacity.SPECS[arguments.spec](), arguments.spec
    elif arguments.spec is not None:
        try:
            other = models.checkpoint_of(arguments.spec)
        except CommandError as error:
            names = ", ".join(capacity.SPECS)
            raise CommandError(f"--spec {arguments.spec} is neither one of {names} nor a model: {error}") from error
        spec, name = models.config_of(other), f"{other}/config.json"
    model, info = models.read_weights(checkpoint)
    try:
        report = capacity.examine(model, capacity.CapacitySpec.from_config(spec, type(model), name))
    except TypeError as error:
        raise CommandError(one_line(error)) from error
    for key in sorted(info["missing_keys"]):
        report.add(key.rpartition(".")[0], f"{key.rpartition('.')[2]} is not in the checkpoint")
    for key, found, _ in sorted(info["mismatched_keys"]):
        report.add(key.rpartition(".")[0], f"{key.rpartition('.')[2]} is {list(found)} in the checkpoint")
    for key in sorted(info["unexpected_keys"]):
        report.add(
            key.rpartition(".")[0],
            f"{key.rpartition('.')[2]} is in the checkpoint, and config.json has no place for it",
        )
    print(report)
    return 0 if report.ok else 1
