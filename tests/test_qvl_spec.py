"""The conformance table names things that exist, and what no other test shows."""

import re
from pathlib import Path

from qvl_models import plain_model
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "qvl_model" / "SPEC.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.split("## Measured")[0].splitlines() if line.startswith("|")]
ROWS = [row for row in ROWS if row[0] != "specification" and set(row[0]) != {"-"}]


def test_no_row_is_empty():
    assert len(ROWS) >= 70
    assert not [row for row in ROWS if len(row) != 3 or not all(row)]
    assert not [row for row in ROWS if not re.search(r"`tests/", row[2])]


def test_files_and_tests_exist():
    for name in re.findall(r"`((?:qvl_model|qvl_kernels|csrc|tests|bench)/[\w/.-]+)", TEXT):
        assert (ROOT / name).is_file(), f"SPEC.md names {name}"
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT):
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), flags=re.MULTILINE), f"SPEC.md names {file}::{test}"


def test_readme_example():
    """It runs as it stands."""
    section = (ROOT / "README.md").read_text().split("## QVL\n")[1].split("\n## ")[0]
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)[1], names)
    assert names["tokens"].shape == (2, 11)


def test_every_norm_has_the_epsilon():
    for name in ("mlp", "attention"):
        modules = list(plain_model(name).modules())
        found = {getattr(m, "eps", getattr(m, "variance_epsilon", None)) for m in modules if isinstance(m, nn.LayerNorm) or "RMSNorm" in type(m).__name__}
        assert found == {1e-12}
