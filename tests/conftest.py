"""The pair of models that several files share, and a report of the seconds of each part of the tests beside its budget
for `make test` on 2 cores.
"""

import os
from collections import defaultdict
from pathlib import Path

import pytest

# Kernels by the static table: results then depend neither on what was measured nor on the user's cache folder.
os.environ["QVL_TUNE"] = "0"
# Threads that wait leave the cores to the other process (see Makefile). PyTorch reads it when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Seconds; together about 20 minutes, set-up included. Tests that do not fit are marked slow.
BUDGETS = {"kernels": 420, "model and qvl": 400, "training": 50, "bench": 120}


@pytest.fixture(scope="module")
def odd_pair():
    from models import pair  # needs transformers, which some test environments lack

    return pair("odd")


@pytest.fixture
def models(odd_pair):
    """(stock, accelerated) of odd sizes."""
    for model in odd_pair:
        model.model.rope_deltas = None  # stock keeps those of the last images, and uses them for the next text
    return odd_pair


def part_of(file: str) -> str:
    """By the folder of the test; those of the repository itself count as bench."""
    folder = Path(file).parent.name
    return {"model": "model and qvl", "qvl": "model and qvl", "gpu": "kernels", "tests": "bench"}.get(folder, folder)


def pytest_terminal_summary(terminalreporter):
    seconds = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "fspath"):
                seconds[part_of(report.fspath)] += report.duration
    if sum(seconds.values()) < 30:
        return
    terminalreporter.section("time per part (budget of `make test`)")
    for part, used in seconds.items():
        late = "  OVER: mark something slow" if used > BUDGETS[part] else ""
        terminalreporter.write_line(f"{part:13} {used:5.0f} s of {BUDGETS[part]} s{late}")
