"""The benchmark of the server's engine, on the digits model."""

import json

from bench import serving


def test_measures_requests_that_come_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "AT_ONCE", (1, 4))
    file = tmp_path / "serving.json"
    assert serving.main(["--model", "digits", "--tokens", "3", "--pairs", "2", "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["weights"] == "bf16" and found["machine"]["cores"]
    for row, requests in zip(found["rows"], (1, 4), strict=True):
        assert row["requests"] == requests and len(row["pairs"]) == 2 and row["ratio"] > 0
        assert all(0 < mean <= max(map(max, row["pairs"])) for mean in row["mean"])
    assert "4 requests: joined" in capsys.readouterr().out
