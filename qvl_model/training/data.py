"""Training data on disk. Every row is checked once before training; bad rows are skipped and reported."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from qvl_model.training.encode import Encoder
from qvl_model.training.rows import BadRow, load_image, parse

__all__ = ["DataError", "DatasetRows", "JsonlRows", "Rows", "Skipped", "open_rows"]

_THREADS = 8
_SHOWN = 20
_BLOCK = 4096  # rows handed to the threads at once


class DataError(ValueError):
    """Data without a good row, or that changed during training; the message names file and line."""


@dataclass
class Skipped:
    """The rows of a source that cannot be trained on.

    Attributes:
        source: name of the file or directory.
        total: rows checked, good and bad.
        rows: (line, counted from 1, and reason) of each bad row.
    """

    source: str
    total: int = 0
    rows: list[tuple[int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.total:,} rows, {len(self.rows):,} skipped"]
        lines += [f"  line {line}: {reason}" for line, reason in self.rows[:_SHOWN]]
        if len(self.rows) > _SHOWN:
            lines.append(f"  and {len(self.rows) - _SHOWN:,} more")
        return "\n".join(lines)


class JsonlRows:
    """The lines of a JSONL file, read when they are needed. Empty lines are no rows.

    Args:
        file: the JSONL file.
        images: folder of relative image paths; default the folder of the file.
    """

    def __init__(self, file: str | Path, images: str | Path | None = None) -> None:
        self.file = Path(file)
        self.folder = Path(images) if images is not None else self.file.parent
        self.lines: list[tuple[int, int]] = []  # (number, byte offset)
        digest, offset = hashlib.sha256(), 0
        with open(self.file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                digest.update(line)
                if line.strip():
                    self.lines.append((number, offset))
                offset += len(line)
        self.fingerprint = digest.hexdigest()
        self.name = str(self.file)

    def __len__(self) -> int:
        return len(self.lines)

    def line(self, index: int) -> int:
        return self.lines[index][0]

    def row(self, index: int) -> object:
        """The parsed line. Raises: BadRow."""
        with open(self.file, "rb") as stream:
            stream.seek(self.lines[index][1])
            line = stream.readline()
        try:
            return json.loads(line)
        except UnicodeDecodeError as error:
            raise BadRow(f"is not UTF-8: {error.reason} at byte {error.start}") from error
        except (ValueError, RecursionError) as error:
            raise BadRow(f"is not valid JSON: {error}") from error


class DatasetRows:
    """The rows of a dataset of the ``datasets`` library, or of any sequence of dictionaries with a
    length.
    """

    def __init__(self, dataset: Any, name: str = "dataset") -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"{name} is a {type(dataset).__name__}, which cannot be asked for row number i; save it to disk first"
            )
        self.dataset, self.name, self.folder = dataset, name, Path(".")
        self.fingerprint = getattr(dataset, "_fingerprint", None) or f"{len(dataset)} rows"

    def __len__(self) -> int:
        return len(self.dataset)

    def line(self, index: int) -> int:
        return index + 1

    def row(self, index: int) -> object:
        try:
            return self.dataset[index]
        except (OSError, ValueError, SyntaxError) as error:  # images are decoded here
            raise BadRow(f"cannot be read: {' '.join(str(error).split())}") from error


class Rows(Dataset):
    """The good rows of a source, as an ``Encoder`` makes them: a dataset for a Trainer.

    Args:
        source: JsonlRows or DatasetRows.
        encoder: turns a conversation into tensors; limits the length of a row.
        columns: our column name -> the data's.
        decode: decode every image now, to find broken ones.
    Attributes:
        skipped: the rows that were left out, with reasons.
        without_images: lines of good rows without images.
    Raises: DataError if no good row is left.
    Example:
        >>> rows = Rows(JsonlRows("train.jsonl"), Encoder(processor, max_length=2048))
        >>> print(rows.skipped)
    """

    def __init__(
        self,
        source: JsonlRows | DatasetRows,
        encoder: Encoder,
        *,
        columns: dict[str, str] | None = None,
        decode: bool = True,
    ) -> None:
        self.source, self.encoder, self.columns = source, encoder, columns
        self.skipped = Skipped(source.name, len(source))
        self.good: list[int] = []
        self.without_images: list[int] = []
        for index, (images, reason) in enumerate(self._scan(decode)):
            if reason is not None:
                self.skipped.rows.append((source.line(index), reason))
                continue
            self.good.append(index)
            if images == 0:
                self.without_images.append(source.line(index))
        if not self.good:
            raise DataError(
                f"no row can be trained on\n{self.skipped}" if len(source) else f"{source.name} has no rows"
            )

    def _scan(self, decode: bool) -> Iterator[tuple[int, str | None]]:
        def check(index: int) -> tuple[int, str | None]:
            try:
                conversation = parse(self.source.row(index), self.columns)
                images = [load_image(image, self.source.folder, decode=decode) for image in conversation.images]
                self.encoder.check(conversation, [image.size for image in images])
            except BadRow as error:
                return 0, str(error)
            return len(images), None

        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
            for start in range(0, len(self.source), _BLOCK):
                yield from pool.map(check, range(start, min(start + _BLOCK, len(self.source))))

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = self.good[index]
        try:
            conversation = parse(self.source.row(index), self.columns)
            return self.encoder(conversation, [load_image(image, self.source.folder) for image in conversation.images])
        except BadRow as error:  # the data has changed since it was checked (or data.decode is off)
            raise DataError(f"{self.source.name}, line {self.source.line(index)}: {error}") from error


def open_rows(path: str, *, images: str | None = None, split: str | None = None) -> JsonlRows | DatasetRows:
    """The source at ``path``: a JSONL file, or a directory that ``datasets`` wrote with save_to_disk or can load, such
    as a Hugging Face dataset's repository with its Parquet files.

    Raises: DataError if there is nothing there, the datasets library is missing, or the split is, and for a loading
    script.
    """
    if os.path.isfile(path):
        return JsonlRows(path, images)
    if not os.path.isdir(path):
        raise DataError(f"{path} does not exist; give a JSONL file or the directory of a dataset")
    script = Path(path) / f"{Path(path).resolve().name}.py"
    if script.is_file():
        raise DataError(
            f"{script} is a loading script, and qvl runs no code of data; give the files themselves: Parquet, "
            f"JSONL, save_to_disk"
        )
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path} is a directory; reading it needs the datasets library: pip install datasets"
        ) from error
    saved = any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))
    try:
        dataset = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path} cannot be read as a dataset: {' '.join(str(error).split())}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split is None and len(dataset) == 1:
            split = next(iter(dataset))
        if split not in dataset:
            raise DataError(f"{path} has the splits {', '.join(dataset)}; set data.split to one of them")
        dataset = dataset[split]
    elif split is not None:
        raise DataError(f"{path} has no splits; leave data.split out")
    rows = DatasetRows(dataset, path)
    if images is not None:
        rows.folder = Path(images)
    return rows
