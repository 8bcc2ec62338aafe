"""The result file of a GPU: rows of several runs, each with what it was measured on and how long it took.

A row counts for a later run if the source, the GPU, its driver and the versions are the same; others are kept until
they are measured again, and named with their commit.
"""

import datetime
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from bench.machine import commit

__all__ = ["Results", "source_hash"]

ROOT = Path(__file__).resolve().parents[2]
# What GPU rows are computed with; the command line and the C++ kernels are not.
SOURCES = ("qvl_kernels/**/*.py", "qvl_model/**/*.py", "bench/gpu/*.py", "bench/timing.py", "bench/variants.py")
WITHOUT = ("qvl_model/cli/", "qvl_model/serving/", "qvl_model/training/", "bench/gpu/report.py")


def source_hash(root: Path = ROOT) -> str:
    """Of all files that a row of the GPU benchmark depends on."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in SOURCES for file in root.glob(pattern)}):
        name = file.relative_to(root).as_posix()
        if not name.startswith(WITHOUT):
            digest.update(f"{name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """Rows by name, in a file that is replaced atomically after each of them.

    Args:
        folder: of the result files; one per GPU.
        gpu: name, memory, capability, driver and versions.
        fresh: whether earlier rows are forgotten.
        say: called with a line for each row.
    """

    def __init__(self, folder: Path, gpu: dict, *, fresh: bool = False, say: Callable[[str], None] = print) -> None:
        self.file = folder / f"{re.sub(r'[^a-z0-9]+', '-', gpu['name'].lower()).strip('-')}.json"
        self._key = {"source": source_hash(), "driver": gpu.get("driver"), "versions": gpu["versions"]}
        self._say = say
        cases = {} if fresh else self._earlier(gpu["name"])
        self.values = {"gpu": gpu, "date": datetime.date.today().isoformat(), "commit": commit(), "cases": cases}

    def _earlier(self, name: str) -> dict[str, dict]:
        try:
            values = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}
        if values.get("gpu", {}).get("name") != name:
            return {}
        rows = values.get("cases", {})
        for row in rows.values():  # what the file says of all its rows, each row says of itself
            row.setdefault("commit", values.get("commit"))
        return {key: row for key, row in rows.items() if "value" in row}

    def row(self, name: str) -> dict | None:
        """The row of this name, of whichever run."""
        return self.values["cases"].get(name)

    def counts(self, name: str) -> bool:
        """Whether a row was measured with what is here now."""
        row = self.row(name)
        return row is not None and "value" in row and row.get("key") == self._key

    def seconds(self, name: str) -> float | None:
        """How long a row took, in whichever run."""
        return (self.row(name) or {}).get("seconds")

    def put(self, name: str, answer: dict, seconds: float | None = None) -> None:
        """Adds a row, {"value": ...} or {"error": ...}, writes the file and prints the row as a line of JSON. An error
        takes the place of no value.
        """
        row = {**answer, "key": self._key, "commit": self.values["commit"]}
        if seconds is not None:
            row["seconds"] = round(seconds, 1)
        before = self.row(name)
        if "error" not in answer or before is None or "value" not in before:
            self.values["cases"].pop(name, None)  # at the end, as the latest
            self.values["cases"][name] = row
        self._say(json.dumps({"case": name, **row}))
        self.save()

    def save(self) -> None:
        """Writes the file: as it was before, or whole."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(self.values, indent=1) + "\n")
        os.replace(temporary, self.file)
