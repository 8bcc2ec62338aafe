"""Checkpoints of a run: the newest complete one, the settings that a resumed run must keep, the log of losses."""

import contextlib
import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qvl_model.training.config import ConfigError

__all__ = [
    "RunRecord",
    "finished_steps",
    "last_complete",
    "locked",
    "read_log",
    "truncate_log",
    "write_finished",
]

RECORD = "run.json"
LOG = "log.jsonl"
FINISHED = "finished.json"
STATE = "trainer_state.json"  # the file that the Trainer writes last
_FREE = ("workers",)  # keys of "run" that may change between the runs


def last_complete(directory: Path) -> tuple[Path | None, list[Path]]:
    """(newest checkpoint that was written to its end, newer ones that were not).

    A run that is killed while it writes leaves a directory without trainer_state.json, or with half of one.
    """
    found = [
        (int(match[1]), path)
        for path in directory.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    incomplete = []
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / STATE).read_text())
        except (OSError, ValueError):
            incomplete.append(path)
            continue
        return path, incomplete
    return None, incomplete


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Locks the directory for this process; the system unlocks it when the process ends.

    Raises: ConfigError if another process trains into it: ranks that outlived a killed torchrun, for example.
    """
    with open(directory / ".lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process trains into {directory}; wait for it, end it, or give another output.directory"
            ) from error
        yield


class RunRecord:
    """The settings that the loss curve depends on, in run.json; a run is resumed with equal ones only."""

    def __init__(self, config: dict, fingerprints: Mapping[str, str | None], ranks: int, checkpoint: Path) -> None:
        run = {key: value for key, value in config["run"].items() if key not in _FREE}
        data = {
            key: value for key, value in config["data"].items() if key not in ("train", "validation", "images")
        }  # files may move
        self._path = config["model"]["path"]
        self.values = {
            "model": {**config["model"], "path": _identity(checkpoint)},
            "data": data,
            "optimizer": config["optimizer"],
            "run": run,
            "rows": fingerprints,
            "ranks": ranks,
        }

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RECORD).write_text(json.dumps(self.values, indent=1) + "\n")

    def check(self, directory: Path) -> None:
        """Raises ConfigError if the run in ``directory`` was another one, naming the keys that differ."""
        try:
            before = json.loads((directory / RECORD).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{directory} has checkpoints and no readable {RECORD}; give another output.directory"
            ) from error
        now = json.loads(json.dumps(self.values))
        if before.get("model", {}).get("path") == self._path:  # as older versions wrote it
            before["model"]["path"] = now["model"]["path"]
        changed = [f"{key} ({was!r} then, {new!r} now)" for key, was, new in _differences(before, now)]
        if changed:
            raise ConfigError(
                f"{directory} has checkpoints of another run: {'; '.join(changed)}. Change these back to resume it, "
                f"or give another output.directory"
            )


def _identity(checkpoint: Path) -> str:
    """What a checkpoint is, wherever it lies: its architecture, and names, shapes and size of its tensors."""
    digest = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for file in sorted(checkpoint.glob("*.safetensors")):
        with open(file, "rb") as stream:
            digest.update(stream.read(int.from_bytes(stream.read(8), "little")))
        digest.update(str(file.stat().st_size).encode())
    return digest.hexdigest()[:16]


def finished_steps(directory: Path) -> int | None:
    """Steps of a run that has written its final model; None for others."""
    try:
        return int(json.loads((directory / FINISHED).read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_finished(directory: Path, steps: int) -> None:
    """Notes that the run has written its final model."""
    (directory / FINISHED).write_text(json.dumps({"steps": steps}) + "\n")


def _differences(before: dict, now: dict, group: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys((*before, *now)):
        was, new = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(new, dict):
            yield from _differences(was, new, f"{group}{key}.")
        elif was != new:
            yield f"{group}{key}", was, new


def read_log(directory: str | Path) -> list[dict]:
    """The lines of log.jsonl: step, and loss with learning_rate and grad_norm, or eval_loss. A line that was cut
    short is left out.

    Example:
        >>> [line["loss"] for line in read_log("out") if "loss" in line]
    """
    entries = []
    try:
        lines = (Path(directory) / LOG).read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def truncate_log(directory: Path, step: int) -> None:
    """Drops lines after ``step``, since a run that resumes there logs them again."""
    kept = [entry for entry in read_log(directory) if entry["step"] <= step]
    temporary = directory / (LOG + ".new")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    temporary.replace(directory / LOG)
