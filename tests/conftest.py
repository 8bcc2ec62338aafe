"""The pair of models that several files share, and where the time of a run goes: seconds of each part of the tests
beside its budget for `make test` on 2 cores.
"""

from collections import defaultdict
from pathlib import Path

import pytest

# Seconds; together about 20 minutes with what the set-up takes. What does not fit is marked slow.
BUDGETS = {"kernels": 420, "model": 330, "training": 60, "digits": 60, "bench": 90}


@pytest.fixture(scope="module")
def odd_pair():
    from models import pair  # needs transformers, which not every environment that runs some of the tests has

    return pair("odd")


@pytest.fixture
def models(odd_pair):
    """(stock, accelerated) of odd sizes."""
    for model in odd_pair:
        model.model.rope_deltas = None  # stock keeps those of the last images, and uses them for the next text
    return odd_pair


def part_of(file: str) -> str:
    name = Path(file).stem
    for part, prefixes in {
        "model": ("test_model", "test_generation", "test_qvl", "test_packed"),
        "training": ("test_training", "test_capacity"),
        "digits": ("test_digits", "test_cli", "test_processing"),
        "bench": ("test_bench", "test_peers", "test_structure"),
    }.items():
        if name.startswith(prefixes):
            return part
    return "kernels"


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
        terminalreporter.write_line(f"{part:8} {used:5.0f} s of {BUDGETS[part]} s{late}")
