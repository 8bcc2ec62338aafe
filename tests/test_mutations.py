"""The mutations of ``make mutate``: every expression occurs once, every test exists; and the verdicts of the runner."""

import re

import mutate
import pytest
from mutations import MUTATIONS, Mutation


def test_every_mutation_can_be_made():
    for mutation in MUTATIONS:
        text = mutate.mutated((mutate.ROOT / mutation.file).read_text(), mutation)
        compile(text, mutation.file, "exec")
        for test in mutation.tests.split("\n"):
            file, _, name = test.partition("::")
            source = (mutate.ROOT / file).read_text()
            assert not name or re.search(rf"^def {name.partition('[')[0]}\(", source, flags=re.MULTILINE), (
                f"no test {test}"
            )
    assert len({mutation[:3] for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("old", ["def nothing_of_it", "import"])
def test_an_expression_that_does_not_stand_there_once_is_refused(old):
    with pytest.raises(ValueError, match="stands there once"):
        mutate.main([Mutation("tests/helpers/mutate.py", old, "pass", "tests/test_mutations.py")], [])


@pytest.fixture
def tree(tmp_path, monkeypatch):
    (tmp_path / "doubling.py").write_text("def twice(x):\n    return 2 * x\n")
    (tmp_path / "test_it.py").write_text("import doubling\n\n\ndef test_it():\n    assert doubling.twice(4) == 8\n")
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    return tmp_path


def test_a_fault_that_is_seen(tree, capsys):
    assert mutate.main([Mutation("doubling.py", "2 * x", "3 * x", "test_it.py")], ["--jobs", "1"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["pass", "seen"]
    assert "2 * x" in (tree / "doubling.py").read_text()


@pytest.mark.parametrize(
    "statuses, words",
    [
        ([0, 0], ["pass", "SURVIVED"]),
        ([0, 2], ["pass", "NO TESTS RAN"]),
        ([0, 5], ["pass", "NO TESTS RAN"]),
        ([0, None], ["pass", "TIME OUT"]),
        ([1, 1], ["FAIL WITHOUT A FAULT", "seen"]),
    ],
)
def test_what_else_fails(tree, monkeypatch, capsys, statuses, words):
    given = iter(statuses)
    monkeypatch.setattr(mutate, "run_tests", lambda *_: (next(given), "the end of the output"))
    assert mutate.main([Mutation("doubling.py", "2 * x", "3 * x", "test_it.py")], ["--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert all(line.startswith(word) for line, word in zip(out.splitlines(), words)) and out.rstrip().endswith(
        "the end of the output"
    )
