"""``qvl generate``, ``chat`` and ``batch``: options of sampling, conversations on a kept cache, many rows."""

import io
import json
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from qvl_model import cli, digits
from qvl_model.cli import answers, batch_rows, chat, models
from qvl_model.digits import scenes

QUESTION = "Read the digits from left to right."


def _json(capsys, *arguments):
    assert cli.main(["generate", "--json", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    return json.loads(out), err


def test_json(capsys):
    found, err = _json(capsys, "--image", digits.SAMPLE, "--prompt", QUESTION)
    assert found["text"] == "8 6 9" and found["finish_reason"] == "stop" and found["variant"] == "accelerated"
    assert found["completion_tokens"] > 1 < found["prompt_tokens"] and found["model"] == str(digits.CHECKPOINT)
    assert 0 < found["seconds_to_first_token"] < found["seconds"] and found["tokens_per_second"] > 0
    assert "cut after" not in err
    found, err = _json(capsys, "--image", digits.SAMPLE, "--prompt", QUESTION, "--max-new-tokens", 2)
    assert found["finish_reason"] == "length" and found["completion_tokens"] == 2 and "cut after 2 tokens" in err
    assert _json(capsys, "--image", digits.SAMPLE, "--prompt", QUESTION, "--quiet")[1] == ""


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights(weights, capsys):
    assert _json(capsys, "--image", digits.SAMPLE, "--prompt", QUESTION, "--weights", weights)[0]["text"] == "8 6 9"


def test_prompts_from_files_and_standard_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompt.txt").write_text(f"{QUESTION}\n")
    assert _json(capsys, "--image", digits.SAMPLE, "--prompt-file", tmp_path / "prompt.txt")[0]["text"] == "8 6 9"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    assert _json(capsys, "--image", digits.SAMPLE, "--prompt", "-")[0]["text"] == "8 6 9"


def test_sampling(capsys):
    """Seeds repeat, temperature 0 is greedy, and one candidate is greedy too."""
    options = ["--prompt", "x", "--max-new-tokens", 12]
    greedy = _json(capsys, *options, "--greedy")[0]["text"]
    assert _json(capsys, *options, "--temperature", 0)[0]["text"] == greedy
    assert _json(capsys, *options, "--top-k", 1)[0]["text"] == greedy
    hot = [
        _json(capsys, *options, "--temperature", 30, "--top-k", 5000, "--seed", seed)[0]["text"] for seed in (1, 1, 2)
    ]
    assert hot[0] == hot[1] != hot[2]


def test_a_system_prompt_is_the_first_turn(capsys):
    plain, told = (
        _json(capsys, "--prompt", "x", "--max-new-tokens", 1, *more)[0]["prompt_tokens"]
        for more in ([], ["--system", "Answer in one word."])
    )
    assert told > plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "--temperature must be 0 or more"),
        (["--temperature", "nan"], "--temperature must be 0 or more"),
        (["--top-p", "0"], "--top-p must be above 0"),
        (["--top-p", "1.5"], "--top-p must be above 0"),
        (["--top-k", "0"], "--top-k must be at least 1"),
        (["--greedy", "--seed", "1"], "--greedy samples nothing"),
        (["--max-new-tokens", "-3"], "--max-new-tokens must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--stock", "--weights", "int8"], "leave --weights out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_mean_nothing(options, message, capsys):
    assert cli.main(["generate", "--prompt", "x", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def _chat(monkeypatch, capsys, *lines, options=()):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert cli.main(["chat", "--greedy", "--max-new-tokens", "8", *map(str, options)]) == 0
    return capsys.readouterr()


def test_a_chat_is_the_conversation_from_scratch(monkeypatch, capsys):
    """Turns on the kept cache give what the whole conversation gives without one, with images in two of them."""
    turns = [(QUESTION, True), ("Which digit is the largest?", False), ("Again.", False), (QUESTION, True)]
    lines = [line for text, shown in turns for line in ([f"/image {digits.SAMPLE}"] if shown else []) + [text]]
    out = _chat(monkeypatch, capsys, *lines).out.splitlines()
    loaded = models.load("digits")
    conversation = answers.Conversation()
    for (text, shown), line in zip(turns, out, strict=True):
        conversation.ask(text, [Image.open(digits.SAMPLE).convert("RGB")] * shown)
        inputs = answers.inputs_of(loaded, [conversation])
        found, _ = answers.answer(loaded, inputs, {"max_new_tokens": 8, "do_sample": False}, lambda text: None)
        assert line == found.text
        conversation.reply(found.text)
    assert out[0] == "8 6 9"


def test_a_turn_computes_only_what_is_new(monkeypatch):
    loaded = models.load("digits")
    lengths = []
    loaded.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    talk = chat.Chat(loaded, {"max_new_tokens": 3, "do_sample": False})
    talk.waiting = [Image.open(digits.SAMPLE)]
    first = talk.ask(QUESTION)
    del lengths[:]
    second = talk.ask("And now?")
    assert lengths[0] <= second.prompt_tokens - first.prompt_tokens
    talk.reset()
    assert talk.ask(QUESTION).prompt_tokens < second.prompt_tokens and not talk.conversation.images


def test_commands_of_a_chat(monkeypatch, capsys):
    out, err = _chat(
        monkeypatch, capsys, "/help", "/image none.png", "", f"/image '{digits.SAMPLE}'", "/reset", "/exit", QUESTION
    )
    assert out == "" and "/reset" in err and "qvl: image none.png does not exist" in err and "is empty" in err


def test_ctrl_c_stops_the_answer_and_not_the_chat():
    loaded = models.load("digits")
    talk = chat.Chat(loaded, {"max_new_tokens": 400, "min_new_tokens": 400, "do_sample": False})
    seen = []

    def interrupt(module, args, output):
        seen.append(1)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a process in the background may ignore it
    handle = loaded.model.model.language_model.register_forward_hook(interrupt)
    found = talk.ask(QUESTION)
    handle.remove()
    assert found.finish_reason == "interrupted" and 0 < found.completion_tokens < 20
    talk.options = {"max_new_tokens": 3, "do_sample": False}
    assert talk.ask("And now?").completion_tokens > 0
    assert signal.getsignal(signal.SIGINT) is before


def _rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images of digits, one file that is no image, and one that is another thing."""
    folder = tmp_path_factory.mktemp("images")
    questions = [q for q in scenes.held_out_questions(60) if q.kind == "read"][:7]
    for i, question in enumerate(questions):
        question.image.save(folder / f"{i}.png")
    (folder / "broken.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


def test_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "new" / "out.jsonl"
    assert cli.main(["batch", str(folder), "--prompt", QUESTION, "--out", str(out), "--batch", "3", "--greedy"]) == 0
    err = capsys.readouterr().err
    assert "broken.jpg is skipped: image broken.jpg cannot be read" in err and "7 rows answered, 1 skipped" in err
    found = {row["id"]: row for row in _rows(out)}
    assert found.keys() == {f"{i}.png" for i in range(7)}
    for name, row in found.items():
        alone, _ = _json(capsys, "--image", folder / name, "--prompt", QUESTION, "--greedy")
        assert all(row[key] == alone[key] for key in ("text", "finish_reason", "prompt_tokens", "completion_tokens"))


def test_bad_rows_are_told_and_skipped(folder, tmp_path, capsys):
    lines = [
        {"prompt": QUESTION, "image": str(folder / "0.png"), "id": "a"},
        b"{",
        [1],
        {"image": "0.png"},
        {"prompt": "x", "image": 3},
        {"prompt": "x", "id": "a"},
        {"prompt": "x", "id": [1]},
        {"prompt": "x", "image": "p" * 5000},
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "' + b"x" * (1 << 21) + b'"}',
        b"\xff\xfe",
        {"prompt": "x", "image": "http://example.com/a.png"},
        {"prompt": "what is <|image_pad|>"},
        {"prompt": QUESTION, "images": [str(folder / "1.png"), str(folder / "2.png")], "system": "Read."},
    ]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    assert cli.main(["batch", str(file), "--out", str(out), "--max-new-tokens", "8"]) == 0
    err = capsys.readouterr().err
    assert [row["id"] for row in sorted(_rows(out), key=lambda row: str(row["id"]))] == [14, "a"]
    for number, reason in (
        (2, "no JSON"),
        (3, "is a list"),
        (4, 'has no "prompt"'),
        (5, "a path or a list"),
        (6, "has the id 'a'"),
        (7, "a text or a number"),
        (8, "File name too long"),
        (9, "lone surrogate"),
        (10, "longer than 1 MB"),
        (11, "no JSON"),
        (12, "is an address"),
        (13, "image_pad"),
    ):
        assert any(f"line {number} is skipped" in line and reason in line for line in err.splitlines()), number
    assert "2 rows answered, 12 skipped" in err and max(map(len, err.splitlines())) < 700


def test_a_batch_goes_on_where_it_was_killed(folder, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    arguments = ["batch", str(folder), "--prompt", QUESTION, "--out", str(out), "--batch", "2"]
    assert cli.main(arguments) == 0
    whole = _rows(out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:10])  # as a kill leaves it
    assert cli.main(arguments) == 0
    assert "4 rows answered, 3 before" in capsys.readouterr().err
    assert sorted(map(str, _rows(out))) == sorted(map(str, whole))
    before = out.read_bytes()
    assert cli.main(arguments) == 0 and out.read_bytes() == before
    assert "0 rows answered, 7 before, 1 skipped" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "x", "id": "0.png"}))
    assert cli.main(["batch", str(tmp_path / "in.jsonl"), "--out", str(out)]) == 0
    assert "all 7 rows are answered already" in capsys.readouterr().err and out.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--out", "x"], "neither a folder"),
        (["FOLDER", "--out", "x"], "--prompt says what"),
        (["FOLDER", "--prompt", "x", "--out", "FOLDER"], "is not a file"),
        (["FOLDER", "--prompt", "x", "--out", "FOLDER/notes.txt"], "something else than answers"),
        (["FOLDER", "--prompt", "x", "--out", "x", "--batch", "0"], "--batch must be at least 1"),
        (["FOLDER/empty.jsonl", "--out", "x"], "no rows that can be answered"),
    ],
)
def test_mistakes_of_a_batch(folder, arguments, message, capsys):
    (folder / "empty.jsonl").touch()
    assert cli.main(["batch", *(word.replace("FOLDER", str(folder)) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert (folder / "notes.txt").read_text() == "no image either"


def test_only_what_is_needed_is_imported():
    """Help, version and usage errors come before PyTorch; names of qvl_model are there in any other program."""
    code = (
        "import sys; sys.argv = ['qvl', *sys.argv[1:]]\n"
        "from qvl_model.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)\n"
    )
    for arguments, status in ((["--help"], 0), (["--version"], 0), (["chat", "--help"], 0), (["generate"], 2), ([], 2)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == status and done.stderr.endswith("False False\n"), done.stderr
    code = "import qvl_model, transformers as t; print(t.AutoConfig.for_model('qvl').model_type, qvl_model.accelerate)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("qvl <function accelerate"), done.stderr


def test_help_is_fast():
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "qvl_model.cli", "--help"], capture_output=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_rows_that_fail_together_are_answered_alone(folder):
    """One row that the processor refuses does not take those beside it along."""
    rows = [
        batch_rows.Row(0, "row 0", QUESTION, ["0.png"], folder),
        batch_rows.Row(1, "row 1", "what is <|image_pad|>", [], folder),
        batch_rows.Row(2, "row 2", QUESTION, ["1.png"], folder),
    ]
    loaded = models.load("digits")
    found = batch_rows.answers_to(loaded, rows, {"max_new_tokens": 8})
    assert [row["id"] for row in found.rows] == [0, 2] and [place for place, _ in found.bad] == ["row 1"]
    assert torch.is_grad_enabled()
