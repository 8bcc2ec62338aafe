"""bench.compare: two checkouts in turns."""

import json
import shutil
from pathlib import Path

import pytest

from bench import compare
from qvl_model import digits

ROOT = Path(__file__).resolve().parents[2]


def test_two_checkouts_run_in_turns(tmp_path):
    other = tmp_path / "other"
    for package in ("qvl_kernels", "qvl_model"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    rows = compare.measure(
        other,
        Path(digits.CHECKPOINT),
        "int8",
        [("generate", 1), ("loop", 2), ("prompt", 1)],
        tokens=4,
        pairs=2,
        threads=1,
    )
    assert [(row["weights"], row["kind"], row["rows"]) for row in rows] == [
        ("int8", "generate", 1),
        ("int8", "loop", 2),
        ("int8", "prompt", 1),
    ]
    for row in rows:
        ratios = sorted(this / that for that, this in row["pairs"])
        assert len(ratios) == 2 and row["median"] == pytest.approx(sum(ratios) / 2) and ratios[0] > 0


def test_a_folder_that_is_no_checkout(tmp_path):
    """Its process finds the qvl that is installed."""
    with pytest.raises(RuntimeError, match="imports qvl_kernels from|a worker ended"):
        compare.measure(tmp_path, Path(digits.CHECKPOINT), "bf16", [("loop", 1)], tokens=4, pairs=1, threads=1)


def test_rows_of_other_cases_are_kept(tmp_path):
    file = tmp_path / "pairs.json"
    for kind, median in (("loop", 1.0), ("generate", 1.1), ("loop", 0.9)):
        compare._merge(file, {"rows": [{"weights": "int8", "kind": kind, "rows": 1, "median": median}]})
    kept = {row["kind"]: row["median"] for row in json.loads(file.read_text())["rows"]}
    assert kept == {"loop": 0.9, "generate": 1.1}
