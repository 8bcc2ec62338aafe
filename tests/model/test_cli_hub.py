"""Models by their names on the Hugging Face hub: a stand-in for the hub on loopback, and offline."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qvl_model import digits

COMMIT = "0123456789abcdef0123456789abcdef01234567"
QUESTION = ["--image", str(digits.SAMPLE), "--prompt", "Read the digits from left to right.", "--quiet"]


class _Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's protocol that ``snapshot_download`` uses, for one repository."""

    paths: list[str] = []
    files = {file.name: file for file in Path(digits.CHECKPOINT).iterdir() if file.is_file()} | {
        "pytorch_model.bin": Path(digits.CHECKPOINT) / "config.json"  # never asked for
    }

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        self.paths.append(path)
        if path == f"/tests/digits/resolve/{COMMIT}/{Path(path).name}" and Path(path).name in self.files:
            data = self.files[Path(path).name].read_bytes()
            return self._send(200, data, body, ETag=f'"{hashlib.sha256(data).hexdigest()}"')
        if path in ("/api/models/tests/digits/revision/main", "/api/models/tests/digits"):
            siblings = [{"rfilename": name} for name in self.files]
            answer = {"id": "tests/digits", "modelId": "tests/digits", "sha": COMMIT, "siblings": siblings}
            return self._send(200, json.dumps(answer | {"tags": [], "private": False, "downloads": 0}).encode(), body)
        if path == f"/api/models/tests/digits/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "oid": COMMIT, "size": file.stat().st_size}
                for name, file in self.files.items()
            ]
            return self._send(200, json.dumps(entries).encode(), body)
        return self._send(404, b"{}", body, **{"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def _send(self, status: int, data: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _Hub.paths.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _generate(name: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qvl_model.cli", "generate", "--model", name, *QUESTION]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    return subprocess.run(
        command, env=kept | {"HF_HOME": str(home)} | environment, capture_output=True, text=True, timeout=120
    )


def test_a_model_comes_from_the_hub_and_then_from_the_cache(hub, tmp_path):
    done = _generate("tests/digits", tmp_path, HF_ENDPOINT=hub, HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0 and done.stdout.strip() == "8 6 9", done.stderr
    asked = {Path(path).name for path in _Hub.paths}
    assert "model.safetensors" in asked and "pytorch_model.bin" not in asked
    again = _generate("tests/digits", tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout.strip() == "8 6 9", again.stderr


def test_a_model_that_the_hub_does_not_have(hub, tmp_path):
    done = _generate("tests/nothing", tmp_path, HF_ENDPOINT=hub)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tests/nothing is neither a directory nor a public model on the hub" in done.stderr


def test_offline_the_command_that_fetches_it_is_named(tmp_path):
    done = _generate("tests/digits", tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "hf download tests/digits --local-dir digits" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
