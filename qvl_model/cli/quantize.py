"""``qvl quantize``: a checkpoint in int8 or int4."""

import argparse
import time
from pathlib import Path

from qvl_model.cli import models
from qvl_model.cli.errors import CommandError, reading_errors

__all__ = ["add", "run"]

EXAMPLES = """examples:
  qvl quantize --model DIR --weights int8 --out DIR-int8
  qvl quantize --model DIR --weights int4 --calibrate --out DIR-int4
"""


def add(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "quantize",
        help="quantise the weights of a checkpoint to int8 or int4",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help=models.HELP)
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["int8"],
        metavar="FORMAT",
        help="int8 or int4, or by part or pattern of layer names, as in: text=int4 vision=int8 *.down_proj=int8; parts "
        "not named keep their weights (default: int8)",
    )
    parser.add_argument(
        "--group", type=int, choices=(32, 64, 128), help="inputs that share an int4 scale (default: 32)"
    )
    parser.add_argument(
        "--calibrate",
        nargs="?",
        const="default",
        metavar="FILE.jsonl",
        help="choose input scales on the texts and images of the package, or on those of a file",
    )
    parser.add_argument(
        "--bits",
        type=float,
        help="average bits per weight of parts in int4: the most sensitive layers are int8 (default: 4.85)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--force", action="store_true", help="replace what is in DIR")
    return parser


def run(arguments: argparse.Namespace) -> None:
    checkpoint = models.checkpoint_of(arguments.model)
    models.config_of(checkpoint)
    from qvl_model import pretrained
    from qvl_model.checkpoint_files import one_line
    from qvl_model.quantization import convert

    start = time.perf_counter()
    try:
        formats = convert.formats_of(_formats(arguments.weights))
        pretrained.quantize(
            checkpoint,
            arguments.out,
            formats,
            arguments.group,
            arguments.calibrate,
            arguments.bits,
            replace=arguments.force,
        )
    except reading_errors() as error:
        raise CommandError(one_line(error)) from error
    before, after = (
        sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) for path in (checkpoint, arguments.out)
    )
    print(
        f"{arguments.out}: {after / 1e9:.2f} GB of weights, from {before / 1e9:.2f} GB, in "
        f"{time.perf_counter() - start:.0f} s"
    )


def _formats(words: list[str]) -> str | dict[str, str]:
    """The argument ``weights`` of ``accelerate``, from one format or from words part=format."""
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    parts = dict(word.partition("=")[::2] for word in words)
    if len(parts) != len(words) or not all(parts.values()):
        raise CommandError(f"--weights takes one format, or part=format for each part once; got {' '.join(words)}")
    return parts
