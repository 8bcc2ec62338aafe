"""A plugin of pytest that writes the outcome of each test as it ends, so that a killed run loses one test at most."""

import json
import os

import pytest

__all__ = ["FILE"]

FILE = "QVL_TEST_OUTCOMES"  # environment variable: the file to add lines to


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcome = "failed" if report.outcome == "failed" else report.outcome
        reason = str(report.longrepr)[-300:] if report.outcome == "failed" else ""
        with open(os.environ[FILE], "a") as stream:
            stream.write(json.dumps({"test": report.nodeid, "outcome": outcome, "reason": reason}) + "\n")
