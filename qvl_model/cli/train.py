"""``qvl train``: training as a YAML file says."""

import argparse
import os
import sys

from qvl_model.cli.errors import CommandError

__all__ = ["add", "run"]


def add(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    parser = commands.add_parser("train", help="train a model as a YAML file says, or resume a run")
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="the configuration")
    parser.add_argument(
        "--keys", action="store_true", help="print every key of the configuration with its default and meaning"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.keys:
        from qvl_model.training import describe_keys

        print(describe_keys())
        return 0
    if arguments.config is None:
        raise CommandError("train needs a CONFIG.yaml; --keys lists what may stand in it")
    from qvl_model import api, capacity  # noqa: F401  api registers QVL
    from qvl_model.checkpoint_files import one_line

    try:
        from qvl_model import training
        from qvl_model.training import run as _  # noqa: F401
    except ImportError as error:  # packages that the Trainer needs
        raise CommandError(f"training needs more packages: pip install 'qvl[train]' ({one_line(error)})") from error
    try:
        result = training.train(training.TrainConfig.from_yaml(arguments.config))
    except capacity.CapacityError as error:
        print(f"qvl: training was stopped, the model lost capacity. {error}", file=sys.stderr)
        return 1
    except (training.ConfigError, training.DataError) as error:
        raise CommandError(str(error)) from error
    except training.Diverged as error:
        print(f"qvl: {error}", file=sys.stderr)
        return 1
    except training.Stopped as error:
        print(f"qvl: {error}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("\nqvl: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{result.steps} steps; the model is in {result.directory}")
    return 0
