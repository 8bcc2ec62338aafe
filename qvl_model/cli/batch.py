"""``qvl batch``: many prompts, from a folder of images or a JSONL file, into a JSONL file."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qvl_model.cli import answers, models
from qvl_model.cli.errors import CommandError

__all__ = ["BadRow", "Row", "add", "rows_of", "run"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MAX_LINE = 1 << 20  # bytes
BEGIN = b'{"id": '  # of a line of the output
AHEAD = 16  # batches that are sorted by length together

EXAMPLES = """examples:
  qvl batch photos/ --prompt "Describe this image." --out captions.jsonl
  qvl batch questions.jsonl --out answers.jsonl --weights int8 --batch 8

A line of questions.jsonl is {"prompt": text}, with "image": path or list of paths, "system": text and "id": text or
number if wanted. A line of the output is {"id", "text", "finish_reason", "prompt_tokens", "completion_tokens"}; an id
that is not given is the name of the image, or the number of the line. The same command goes on where it was stopped.
"""


class BadRow(ValueError):
    """A row that cannot be answered; the message is the reason."""


@dataclass
class Row:
    """One prompt.

    Attributes:
        place: where it stands, for messages: the line, or the name of the image.
        images: paths, relative to ``folder``.
    """

    id: str | int
    place: str
    prompt: str
    images: list[str]
    folder: Path
    system: str | None = None

    def conversation(self) -> answers.Conversation:
        """Raises: BadRow for images that cannot be read."""
        from qvl_model.images import load_image

        try:
            images = [load_image(file, self.folder) for file in self.images]
        except ValueError as error:
            raise BadRow(str(error)) from error
        return answers.Conversation.of(self.prompt, images, self.system)


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
    answers.add_sampling(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.batch < 1:
        raise CommandError(f"--batch must be at least 1, got {arguments.batch}")
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
    loaded = models.load(arguments.model, weights=arguments.weights, threads=arguments.threads)
    with _appended(out) as stream:
        answered = _answer(loaded, rows, arguments.batch, options, stream, skipped)
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


def rows_of(source: Path, prompt: str | None, system: str | None, skipped: Any) -> Iterator[Row]:
    """The rows of a folder or file, in order; ``skipped`` is called with the place and the reason of bad ones.

    Raises: CommandError for an input that does not exist.
    """
    if source.is_dir():
        if prompt is None:
            raise CommandError("--prompt says what is asked about each image of the folder")
        for file in sorted(source.iterdir()):
            if file.suffix.lower() in SUFFIXES:
                yield Row(file.name, file.name, prompt, [file.name], source, system)
        return
    if not source.is_file():
        raise CommandError(f"{source} is neither a folder of images nor a JSONL file")
    with open(source, "rb") as stream:
        seen: set[str | int] = set()
        for number, line in _lines(stream):
            place = f"{source}, line {number}"
            try:
                row = _parsed(line, number, place, source.parent, prompt, system)
            except BadRow as error:
                skipped(place, str(error))
                continue
            if row.id in seen:
                skipped(place, f"another row has the id {row.id!r}")
                continue
            seen.add(row.id)
            yield row


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of lines that are not empty; None stands for one that is too long, which is not kept."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE)
            yield number, None
        elif line.strip():
            yield number, line


def _parsed(line: bytes | None, number: int, place: str, folder: Path, prompt: str | None, system: str | None) -> Row:
    if line is None:
        raise BadRow(f"it is longer than {MAX_LINE >> 20} MB")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise BadRow(f"it is no JSON ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(row, dict):
        raise BadRow(f"it is a {type(row).__name__}, not an object")
    images = row.get("image", row.get("images", []))
    images = images if isinstance(images, list) else [images]
    text, identity = row.get("prompt", prompt), row.get("id", number)
    system = row.get("system", system)
    if not isinstance(text, str) or not text.strip():
        raise BadRow('it has no "prompt"; --prompt gives one to all')
    if not all(isinstance(image, str) for image in images):
        raise BadRow('"image" must be a path or a list of paths')
    if system is not None and not isinstance(system, str):
        raise BadRow('"system" must be a text')
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise BadRow('"id" must be a text or a number')
    for value in (text, system or "", str(identity)):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow("it has half of a character (a lone surrogate)") from error
    return Row(identity, place, text, images, folder, system)


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


def _answer(
    loaded: models.Loaded, rows: list[Row], size: int, options: dict, stream: BinaryIO, skipped: _Skipped
) -> int:
    """Answers rows in batches of similar length, each batch on disk before the next one begins; returns how many."""
    from tqdm import tqdm

    answered = 0
    with tqdm(total=len(rows), unit="row", disable=None) as bar:
        for begin in range(0, len(rows), size * AHEAD):
            window = rows[begin : begin + size * AHEAD]
            window.sort(key=lambda row: len(row.prompt) + sum(_area(row, file) for file in row.images))
            for first in range(0, len(window), size):
                batch = window[first : first + size]
                found = _answers(loaded, batch, options, skipped)
                for answer in found:
                    stream.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
                answered += len(found)
                bar.update(len(batch))
    return answered


def _area(row: Row, file: str) -> float:
    """About how many tokens an image takes; 0 for one that cannot be read, which is told later."""
    from qvl_model.images import load_image

    try:
        width, height = load_image(file, row.folder, decode=False).size
    except ValueError:
        return 0.0
    return width * height / 1024


def _answers(loaded: models.Loaded, rows: list[Row], options: dict, skipped: _Skipped) -> list[dict]:
    """Answers to rows in one call of ``generate``; if that raises for what the processor refuses, one by one."""
    import torch

    conversations = []
    for row in rows:
        try:
            conversations.append((row, row.conversation()))
        except BadRow as error:
            skipped(row.place, str(error))
    if not conversations:
        return []
    try:
        inputs = answers.inputs_of(loaded, [conversation for _, conversation in conversations])
    except CommandError as error:
        if len(rows) == 1:
            skipped(rows[0].place, str(error))
            return []
        return [found for row, _ in conversations for found in _answers(loaded, [row], options, skipped)]
    with torch.inference_mode():
        ids = loaded.model.generate(**inputs, **options)
    length, found = inputs["input_ids"].shape[1], []
    for (row, _), new, mask in zip(conversations, ids[:, length:].tolist(), inputs["attention_mask"], strict=True):
        ended = answers.end_of(loaded, new)
        found.append(
            {
                "id": row.id,
                "text": loaded.processor.tokenizer.decode(new[:ended], skip_special_tokens=True),
                "finish_reason": answers.finish_reason(loaded, new),
                "prompt_tokens": int(mask.sum()),
                "completion_tokens": ended,
            }
        )
    return found
