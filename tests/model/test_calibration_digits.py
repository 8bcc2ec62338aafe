"""Calibration on the trained models, with outliers as real models have them, on questions that it has not seen."""

import json
import re

import pytest

from bench import outliers
from qvl_model import cli, digits
from qvl_model.digits import scenes


@pytest.mark.parametrize("name", digits.SHIPPED)
def test_outliers_cost_nothing_after_calibration(name):
    answers = outliers.Answers(name)
    for weights, points in (("int8", 0.003), ("int4", 0.01)):
        found = outliers.run(answers, weights)
        plain, hard, *calibrated = (found[label] for label in outliers.LABELS)
        for kl, exact in calibrated:
            assert kl.value - 2 * kl.error <= 1.2 * plain.kl.value < hard.kl.value / 5
            assert outliers.lost(answers.exact, exact) <= points


@pytest.mark.parametrize("own", [False, True])
def test_command(own, tmp_path, capsys):
    source, options = str(digits.SHIPPED["digits"]), []
    if own:
        scenes.held_out_questions(1)[0].image.save(tmp_path / "scene.png")
        rows = [{"text": "Read the digits."}, {"image": "scene.png", "question": "Which digit is this?"}]
        (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options = [str(tmp_path / "set.jsonl")]
    arguments = ["quantize", "--model", source, "--weights", "int4", "--bits", "5", "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--calibrate", *options]) == 0
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["calibration"]["set"] == ("own" if own else "default")
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    found = re.search(r"bits per weight: ([\d.]+) on average", capsys.readouterr().out)
    assert 4.3 < float(found[1]) <= 5.3  # scales of short rows are a larger part than in real models
    for text, message in (("{}", "line 1 is neither text nor image"), ("", "holds no inputs")):
        (tmp_path / "bad.jsonl").write_text(text)
        arguments[-1] = str(tmp_path / "other")
        assert cli.main([*arguments, "--calibrate", str(tmp_path / "bad.jsonl")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()
