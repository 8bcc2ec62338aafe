"""``qvl batch --ray``: two workers of a cluster on this machine, one of which is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qvl_model import cli, digits
from qvl_model.digits import scenes

ROWS = 40
QUESTION = "Read the digits from left to right."


def _workers(parent):
    """Processes of Ray below ``parent`` that hold a model."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if process.name().startswith("ray::") and process.memory_info().rss > 400 << 20:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path):
    pytest.importorskip("ray")
    questions = [q for q in scenes.held_out_questions(6 * ROWS) if q.kind == "read"][:ROWS]
    with open(tmp_path / "in.jsonl", "w") as stream:
        for i, question in enumerate(questions):
            question.image.save(tmp_path / f"{i}.png")
            stream.write(json.dumps({"prompt": QUESTION, "image": f"{i}.png"}) + "\n")
        stream.write("{\n" + json.dumps({"prompt": "x", "image": "none.png"}) + "\n")
    command = [sys.executable, "-m", "qvl_model.cli", "batch", "in.jsonl", "--batch", "2", "--greedy"]
    options = {"cwd": tmp_path, "text": True, "stderr": subprocess.PIPE}
    subprocess.run([*command, "--out", "alone.jsonl"], check=True, timeout=300, **options)
    out = tmp_path / "out.jsonl"
    with subprocess.Popen([*command, "--out", "out.jsonl", "--ray", "2"], **options) as process:
        while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n")):
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
        os.kill(_workers(process.pid)[0].pid, signal.SIGKILL)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"{ROWS} rows answered, 2 skipped" in err and "line 41 is skipped" in err and "line 42 is skipped" in err
    alone, found = (sorted((tmp_path / name).read_text().splitlines()) for name in ("alone.jsonl", "out.jsonl"))
    assert found == alone and len(found) == ROWS


@pytest.mark.parametrize(
    ("workers", "missing", "message"),
    [("0", False, "--ray must be at least 1"), ("2", True, "--ray needs Ray Data: pip install 'qvl[ray]'")],
)
def test_mistakes(workers, missing, message, tmp_path, monkeypatch, capsys):
    if missing:
        monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "x", "image": str(digits.SAMPLE)}))
    arguments = ["batch", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--ray", workers]
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
