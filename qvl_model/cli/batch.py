"""``qvl batch``: many prompts, from a folder of images or a JSONL file, into a JSONL file."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from qvl_model.cli import answers, models
from qvl_model.cli.batch_rows import Answered, Row, answers_to, rows_of
from qvl_model.cli.errors import CommandError

__all__ = ["add", "run"]

BEGIN = b'{"id": '  # of a line of the output
AHEAD = 16  # batches that are sorted by length together

EXAMPLES = """examples:
  qvl batch photos/ --prompt "Describe this image." --out captions.jsonl
  qvl batch questions.jsonl --out answers.jsonl --weights int8 --batch 8
  qvl batch questions.jsonl --out answers.jsonl --ray 8

A line of questions.jsonl is {"prompt": text}, with "image": path or list of paths, "system": text and "id": text or
number if wanted. A line of the output is {"id", "text", "finish_reason", "prompt_tokens", "completion_tokens"}; an id
that is not given is the name of the image, or the number of the line. The same command goes on where it was stopped.
"""


def add(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "batch",
        help="answer many prompts: a folder of images or a JSONL file in, JSONL out",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="INPUT", help="a folder of images, or a JSONL file")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="answers are added to this file")
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt of rows that have none of their own")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt of rows that have none of their own")
    models.add_model(parser)
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="rows at once (default: %(default)s)")
    parser.add_argument(
        "--ray",
        type=int,
        metavar="WORKERS",
        help="on a Ray cluster (RAY_ADDRESS, else this machine), by so many workers with a model each",
    )
    answers.add_sampling(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.batch < 1:
        raise CommandError(f"--batch must be at least 1, got {arguments.batch}")
    if arguments.ray is not None and arguments.ray < 1:
        raise CommandError(f"--ray must be at least 1, got {arguments.ray}")
    options = answers.sampling_of(arguments)
    source, out = Path(arguments.input), Path(arguments.out)
    done = _done(out)
    skipped = _Skipped()
    rows = [row for row in rows_of(source, arguments.prompt, arguments.system, skipped) if row.id not in done]
    if not rows and not done:
        raise CommandError(f"{source} has no rows that can be answered")
    if not rows:
        print(f"{out}: all {len(done)} rows are answered already", file=sys.stderr)
        return
    batches = _batches(rows, arguments.batch)
    found: Iterable[Answered]
    if arguments.ray is None:
        loaded = models.load(arguments.model, weights=arguments.weights, threads=arguments.threads)
        found = (answers_to(loaded, batch, options) for batch in batches)
    else:
        from qvl_model.cli.batch_ray import answered_by_workers

        found = answered_by_workers(list(batches), arguments, options)
    with _appended(out) as stream:
        answered = _write(found, len(rows), stream, skipped)
    print(
        f"{out}: {answered} rows answered"
        + (f", {len(done)} before" if done else "")
        + (f", {skipped.count} skipped" if skipped.count else ""),
        file=sys.stderr,
    )


class _Skipped:
    """Counts rows that are left out, and says why each of them is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, place: str, reason: str) -> None:
        self.count += 1
        print(f"qvl: {place} is skipped: {reason}", file=sys.stderr)


def _done(out: Path) -> set[str | int]:
    """Ids that are answered already. A line that was cut off by a kill is removed.

    Raises: CommandError for a file of another kind.
    """
    if not out.exists():
        return set()
    if not out.is_file():
        raise CommandError(f"{out} is not a file; give another --out")
    done, whole = set(), 0
    with open(out, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n") and line.startswith(BEGIN[: len(line)]):
                break
            try:
                done.add(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise CommandError(f"{out} holds something else than answers; give another --out") from error
            whole += len(line)
    if whole < out.stat().st_size:
        os.truncate(out, whole)
    return done


def _appended(out: Path) -> BinaryIO:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return open(out, "ab")
    except OSError as error:
        raise CommandError(f"{out} cannot be written: {error.strerror}") from error


def _batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    """Rows of similar length together; those of one window of rows after each other."""
    for begin in range(0, len(rows), size * AHEAD):
        window = rows[begin : begin + size * AHEAD]
        window.sort(key=lambda row: len(row.prompt) + row.area())
        for first in range(0, len(window), size):
            yield window[first : first + size]


def _write(found: Iterable[Answered], total: int, stream: BinaryIO, skipped: _Skipped) -> int:
    """Writes the answers, those of a batch on disk before the next one is asked for; returns how many."""
    from tqdm import tqdm

    answered = 0
    with tqdm(total=total, unit="row", disable=None) as bar:
        for rows, bad in found:
            for place, reason in bad:
                skipped(place, reason)
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
            answered += len(rows)
            bar.update(len(rows) + len(bad))
    return answered
