"""Rows of ``qvl batch``: reading them, and answering a batch of them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qvl_model.cli import answers, models
from qvl_model.cli.errors import CommandError

__all__ = ["Answered", "BadRow", "Row", "answers_to", "rows_of"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MAX_LINE = 1 << 20  # bytes


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

    def area(self) -> float:
        """About how many tokens the images take; one that cannot be read counts 0, and is told later."""
        from qvl_model.images import load_image

        total = 0.0
        for file in self.images:
            try:
                width, height = load_image(file, self.folder, decode=False).size
            except ValueError:
                continue
            total += width * height / 1024
        return total


class Answered(NamedTuple):
    """What became of a batch: lines of the output, and (place, reason) of rows that are skipped."""

    rows: list[dict]
    bad: list[tuple[str, str]]


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


def answers_to(loaded: models.Loaded, rows: list[Row], options: dict) -> Answered:
    """Answers in one call of ``generate``; if it raises for what the processor refuses, one by one."""
    import torch

    conversations, bad = [], []
    for row in rows:
        try:
            conversations.append((row, row.conversation()))
        except BadRow as error:
            bad.append((row.place, str(error)))
    if not conversations:
        return Answered([], bad)
    try:
        inputs = answers.inputs_of(loaded, [conversation for _, conversation in conversations])
    except CommandError as error:
        if len(rows) == 1:
            return Answered([], [(rows[0].place, str(error))])
        alone = [answers_to(loaded, [row], options) for row, _ in conversations]
        return Answered([row for one in alone for row in one.rows], bad + [row for one in alone for row in one.bad])
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
    return Answered(found, bad)
