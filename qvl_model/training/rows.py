"""One row of training data: the forms that are read, and the reasons for which a row is refused.

Three forms are read, each with one image, several or none:

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is
                  this?"}]}, {"role": "assistant", "content": "A seven."}]}
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": "A
    seven."}]} {"images": ["a.png", "b.png"], "question": "Which is larger?", "answer": "The second."}

``<image>`` in a text stands for the next image of "image" or "images"; without any, images go before the first
question. An image is a path, the bytes of a file, or an image of the datasets library.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qvl_model import images

__all__ = ["BadRow", "Conversation", "load_image", "parse"]

PLACE = "<image>"
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class BadRow(ValueError):
    """A row that cannot be trained on; the message is the reason."""


@dataclass(frozen=True)
class Conversation:
    """A parsed row.

    Attributes:
        messages: turns as chat templates take them: role, and content as a list of text and image parts.
        images: the sources of the images, in the order of their placeholders.
    """

    messages: list[dict]
    images: list


def parse(row: object, columns: dict[str, str] | None = None) -> Conversation:
    """Turns a row into a Conversation. ``columns`` maps our column names to the data's. Raises: BadRow."""
    if not isinstance(row, dict):
        raise BadRow(f"is a {type(row).__name__}, not an object")
    if columns:
        row = {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}
    forms = [form for form in ("messages", "conversations", "answer") if row.get(form) is not None]
    if len(forms) != 1:
        raise BadRow(
            "needs exactly one of messages, conversations, and question with answer"
            + (f"; has {', '.join(forms)}" if forms else "")
        )
    if forms == ["answer"]:
        turns = [("user", row.get("question")), ("assistant", row["answer"])]
    else:
        turns = [_turn(turn, i) for i, turn in enumerate(_list(row[forms[0]], forms[0]))]
    images = _outer_images(row)
    messages: list[dict[str, Any]] = []
    placed: list = []
    used = 0
    for i, (role, content) in enumerate(turns):
        parts = []
        for part in _parts(content, i):
            if part["type"] == "image":
                source = part.pop("image", None)
                if source is None:
                    if used >= len(images):
                        raise BadRow(f"has {len(images)} images, and a place for another one in turn {i + 1}")
                    source, used = images[used], used + 1
                placed.append(source)
            parts.append(part)
        messages.append({"role": role, "content": parts})
    if used < len(images):
        if used:
            raise BadRow(f"has {len(images)} images and places for {used}")
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise BadRow("has images and no user turn to show them in")
        earlier = sum(
            part["type"] == "image" for message in messages[: messages.index(first)] for part in message["content"]
        )
        first["content"][:0] = [{"type": "image"} for _ in images]
        placed[earlier:earlier] = images
    _check_turns(messages)
    return Conversation(messages, placed)


def _list(value: object, name: str) -> list:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} must be a list with something in it")
    return value


def _turn(turn: object, index: int) -> tuple[str, object]:
    if not isinstance(turn, dict):
        raise BadRow(f"turn {index + 1} is a {type(turn).__name__}, not an object")
    role, content = (turn.get("role"), turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow(f"turn {index + 1} has the role {role!r}; known are {', '.join(_ROLES)}")
    return _ROLES[role], content


def _outer_images(row: dict) -> list:
    found = [row[name] for name in ("image", "images") if row.get(name) is not None]
    if len(found) > 1:
        raise BadRow("has both image and images")
    return [] if not found else list(found[0]) if isinstance(found[0], (list, tuple)) else found


def _parts(content: object, index: int) -> list[dict]:
    """Content of a turn as parts; texts are split at image placeholders."""
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        content = str(content)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRow(f"turn {index + 1} has no text")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces = part["text"].split(PLACE)
            for i, piece in enumerate(pieces):
                if i:
                    parts.append({"type": "image"})
                if piece:
                    parts.append({"type": "text", "text": piece})
        elif kind in ("image", "image_url"):
            source = next(
                (part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None
            )
            parts.append({"type": "image"} if source is None else {"type": "image", "image": source})
        else:
            raise BadRow(f"turn {index + 1} has a part that is neither text nor an image")
    return parts


def _check_turns(messages: list[dict]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("has no assistant turn to learn from")
    if messages[0]["role"] == "assistant":
        raise BadRow("begins with the assistant")
    for answer in answers:
        if any(part["type"] == "image" for part in answer["content"]):
            raise BadRow("has an image in an assistant turn")
        if not "".join(part["text"] for part in answer["content"]).strip():
            raise BadRow("has an empty assistant turn")


def load_image(source: object, folder: Path, *, decode: bool = True) -> Image.Image:
    """The image of ``source`` (path, bytes, dictionary of either, PIL image), in RGB.

    Args:
        folder: where relative paths start.
        decode: False reads the header only; the result has the right size and no pixels.
    Raises: BadRow if there is no such image or it cannot be read.
    """
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if not isinstance(source, (str, bytes, Image.Image)):
        raise BadRow(f"has an image that is a {type(source).__name__}, not a path")
    if isinstance(source, str):
        source = source.removeprefix("file://")
    try:
        return images.load_image(source, folder, decode=decode)
    except ValueError as error:
        raise BadRow(str(error)) from error
