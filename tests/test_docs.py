"""README.md, docs/ and examples/: commands, paths and links exist, Python runs, and numbers and messages are the real
ones.
"""

import ast
import importlib
import importlib.util
import io
import json
import pkgutil
import re
import shlex
import shutil
from pathlib import Path

import pytest
import transformers
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration as Stock

import bench.__main__ as bench_command
import bench.gpu.__main__ as bench_gpu_command
import qvl_model
from bench import docs, outliers
from qvl_model import cli, digits
from qvl_model.digits import scenes
from qvl_model.digits.export import main as export_digits

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("[A-Z]*.md"), *(ROOT / "docs").glob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
NEEDS_GPU = "<!-- needs a GPU -->"
# So that examples run on the small model that ships, and quickly.
SUBSTITUTES = {
    '"qwen3-vl-2b"': "None",
    "steps: 200": "steps: 2",
    "log_every: 10": "log_every: 1",
    "save_every: 50": "save_every: 1",
    'TrainingArguments("out"': 'TrainingArguments("out", max_steps=1',
}
COMMAND = re.compile(r"(?:qvl [a-zA-Z]|python -m (?:bench|qvl_model)|torchrun ).*")
# Commands that do not run here, and why.
NOT_RUN = {
    "qvl COMMAND --help": "COMMAND is each of them: test_options_exist asks for their help",
    "qvl quantize --calibrate '[FILE.jsonl]'": "a form of the command, in the changelog",
    "python -m bench.compare OTHER": "needs a second checkout: tests/bench/test_compare.py makes one",
    "python -m bench.serving": "loads 2 B parameters: tests/bench/test_serving_bench.py takes the digits model",
    "qvl serve --model PATH --weights int8": "runs until it is stopped: tests/model/test_serve.py",
    "qvl run script.py ARGUMENTS": "changes transformers for the whole process: tests/model/test_auto.py",
    "qvl run lm_eval --model hf-multimodal --model_args pretrained=DIR --tasks TASK": "needs lm_eval and a task's data",
    "qvl train CONFIG.yaml": "before its data; the page's example runs",
    "torchrun --nproc_per_node 4 -m qvl_model.cli train train.yaml": "four processes: tests/training has two",
    "python -m qvl_model.digits.train": "trains for minutes: tests/model/test_digits.py runs a step",
    "python -m bench.docs": "writes the pages: test_tables_are_those_of_the_result_files compares them",
}
# The models that ship have other sizes than the published ones.
FAILS = {"qvl verify PATH --spec qwen3-vl-2b": 1, "qvl verify PATH --spec qvl-2b": 1}


def _text(name: str) -> str:
    return (ROOT / name).read_text()


def _code(text: str) -> list[str]:
    """Lines of code blocks, and code within lines."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", rest)


def test_the_front_page_is_short():
    assert len(_text("README.md").splitlines()) <= 150
    example = next(code for code, _ in _python_blocks("README.md") if "generate(" in code)
    assert len([line for line in example.splitlines() if line]) <= 12


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_and_modules_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", _text("Makefile"), flags=re.MULTILINE))
    for line in _code(_text(name)):
        for target in re.findall(r"(?:^|[;:&] )make ([a-z][a-z-]*)", line):
            assert target in targets, f"{name} names make {target}"
        for module in re.findall(r"python -m ((?:bench|qvl_model|qvl_kernels)[\w.]*)", line):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{name} names {module}"


def test_both_commands_stand_on_the_front_page():
    assert {"make bench", "make test"} <= {" ".join(line.split()[:2]) for line in _code(_text("README.md"))}


def _options(main, arguments: list[str], capsys) -> set[str]:
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


@pytest.mark.parametrize("name", NAMES)
def test_options_exist(name, capsys):
    for line in _code(_text(name)):
        if command := re.match(r"qvl ([a-z]+)", line):
            used = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", line))
            assert used <= _options(cli.main, [command[1]], capsys), f"{name}: {line}"
        if found := re.search(r'make (bench-gpu|bench)\b.*ARGS="([^"]*)"', line):
            main = {"bench": bench_command.main, "bench-gpu": bench_gpu_command.main}[found[1]]
            used = {word for word in found[2].split() if word.startswith("-")}
            assert used <= _options(main, [], capsys), f"{name}: {line}"


@pytest.mark.parametrize("name", NAMES)
def test_paths_exist(name):
    folders = "qvl_model|qvl_kernels|bench|csrc|tests|docs|examples"
    for path in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./<>*-]*)", _text(name)):
        if not set(path) & set("<>*"):
            assert (ROOT / path.rstrip(".")).exists(), f"{name} names {path}"


@pytest.mark.parametrize("name", NAMES)
def test_python_names_exist(name):
    for line in _code(_text(name)):
        for dotted in re.findall(r"(?<![\w/.-])qvl_(?:model|kernels)(?:\.\w+)+", line):
            assert pkgutil.resolve_name(dotted) is not None


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name} links to {link}"
        assert not anchor or anchor in _anchors(target), f"{name} links to {link}"


def test_every_page_is_listed():
    for index in ("README.md", "docs/README.md"):
        links = set(re.findall(r"\]\((?:docs/)?([\w-]+\.md)\)", _text(index)))
        assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= links, index


def test_every_variable_is_described():
    sources = [
        file
        for pattern in ("qvl_*/**/*.py", "bench/**/*.py", "csrc/**/*.cpp", "setup.py")
        for file in ROOT.glob(pattern)
    ]
    asked = r'(?:environ\.get\(|environ\[|getenv\(|^[A-Z_]+ = |ParallelCompile\()"(QVL_[A-Z_]+)"'
    read = {name for file in sources for name in re.findall(asked, file.read_text(), flags=re.MULTILINE)}
    assert read == set(re.findall(r"\| `(QVL_[A-Z_]+)` \|", _text("docs/environment.md")))


# Commands


def _commands(name: str) -> list[str]:
    """Commands of a page in their order, without comments; those that are only named, without arguments, left out."""
    words = [shlex.split(line, comments=True) for line in _code(_text(name)) if COMMAND.fullmatch(line)]
    lines = [shlex.join(each) for each in words]
    return [line for line in lines if not re.fullmatch(r"qvl [a-z]+", line)]


@pytest.fixture
def verbosity():
    """Commands silence transformers."""
    before = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(before)
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("name", [name for name in NAMES if set(_commands(name)) - NOT_RUN.keys()])
def test_commands_run(name, tmp_path, monkeypatch, capsys, verbosity):
    """In their order in one folder, on the digits model; a few rows and steps are enough for training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # commands set it
    Path("qvl_model/digits").mkdir(parents=True)
    for copy in ("photo.jpg", "qvl_model/digits/sample.png"):
        shutil.copy(digits.SAMPLE, copy)
    row = {"image": "photo.jpg", "question": "Read the digits from left to right.", "answer": "8 6 9"}
    for rows in ("FILE.jsonl", "inputs.jsonl"):
        Path(rows).write_text(json.dumps(row) + "\n")
    Path("FILE").write_text(_text("LICENSE")[:1500])
    Path("photos").mkdir()
    shutil.copy(digits.SAMPLE, "photos")
    monkeypatch.setattr("sys.stdin", io.StringIO("Read the digits.\n"))  # of a chat
    example = re.search(r"```yaml\n(# train.yaml.+?)```", _text("docs/training.md"), flags=re.DOTALL)
    Path("train.yaml").write_text(_shortened(example[1]).replace("batch_size: 8", "batch_size: 2"))
    if name == "docs/cli.md":  # which leaves the data to the page about training
        export_digits(["digits", "--rows", "20"])
    for i, line in enumerate(command for command in _commands(name) if command not in NOT_RUN):
        model = digits.SHIPPED["qvl-tiny" if "qvl-2b" in line else "digits"]
        words = shlex.split(line.replace("PATH", str(model)).replace("DIR", f"written-{i}"))
        if words[0] == "qvl":
            main, arguments = cli.main, words[1:]
        else:  # python -m
            main, arguments = importlib.import_module(words[2]).main, words[3:]
        arguments += ["--rows", "20"] if main is export_digits else []
        assert (main(arguments) or 0) == FAILS.get(line, 0), f"{line}: {capsys.readouterr()}"


def test_commands_that_do_not_run_are_in_the_pages():
    named = {line for name in NAMES for line in _commands(name)}
    assert NOT_RUN.keys() <= named and FAILS.keys() <= named


# Numbers


@pytest.mark.parametrize(("page", "name"), docs.SECTIONS, ids="-".join)
def test_tables_are_those_of_the_result_files(page, name):
    """After a change of a result file, run python -m bench.docs."""
    assert docs.section(_text(page), name) == docs.SECTIONS[page, name](docs.RESULTS).strip()


def test_the_chart_is_that_of_the_result_files(tmp_path):
    assert json.loads(Image.open(docs.CHART).info["Description"]) == docs.chart_numbers()
    docs.draw_chart(tmp_path / "again.png")
    assert json.loads(Image.open(tmp_path / "again.png").info["Description"]) == docs.chart_numbers()


def test_the_outliers_are_those_of_the_benchmark():
    factors = " or ".join(f"{factor:.0f}" for factor in outliers.FACTORS)
    assert f"channels become {factors} times as large" in _text("docs/accuracy.md")


def test_generated_parts_are_replaced():
    begin, end = docs.markers("cpu")
    page = f"before\n{begin}\nold\n{end}\nafter\n"
    assert docs.replace_section(page, "cpu", "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    for wrong in ("no markers", page + page):
        with pytest.raises(ValueError, match="once each"):
            docs.replace_section(wrong, "cpu", "new")


# Python


def _python_blocks(name: str) -> list[tuple[str, bool]]:
    """(code, whether it needs a GPU)."""
    found = re.findall(rf"({NEEDS_GPU}\n)?```python\n(.*?)```", _text(name), flags=re.DOTALL)
    return [(code, bool(gpu)) for gpu, code in found]


def _shortened(text: str) -> str:
    for long, short in SUBSTITUTES.items():
        text = text.replace(long, short)
    return text


@pytest.fixture
def auto_classes(monkeypatch):
    """Takes back what ``qvl_model.register`` does."""
    for auto_class in (transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM):
        mapping = auto_class._model_mapping
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    processor = transformers.models.qwen3_vl.processing_qwen3_vl.Qwen3VLProcessor
    inherited = vars(processor).get("from_pretrained")
    yield
    if inherited is None and "from_pretrained" in vars(processor):
        del processor.from_pretrained


@pytest.mark.parametrize("name", [name for name in NAMES if _python_blocks(name)])
def test_python_runs(name, tmp_path, monkeypatch, auto_classes):
    """Blocks of a page share their names. They begin with a stock model and its path, and the digits model stands for
    every model that is fetched.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(digits.CHECKPOINT))
    shutil.copy(digits.SAMPLE, "photo.jpg")  # PIL detects the format by the contents
    if "train.yaml" in _text(name) and (example := re.search(r"```yaml\n(.+?)```", _text(name), flags=re.DOTALL)):
        Path("train.yaml").write_text(_shortened(example[1]) + "  progress: false\n")
        export_digits(["digits", "--rows", "20"])
    names = {
        "path": str(digits.CHECKPOINT),
        "model": Stock.from_pretrained(digits.CHECKPOINT, dtype="auto"),
        "qvl_model": qvl_model,
        "Qwen3VLForConditionalGeneration": qvl_model.Qwen3VLForConditionalGeneration,
    }
    for code, needs_gpu in _python_blocks(name):
        compiled = compile(_shortened(code), name, "exec")
        if not needs_gpu:
            exec(compiled, names)


def _example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_generate():
    assert _example("generate").main() == "8 6 9"


def test_example_int8(tmp_path):
    assert qvl_model.is_accelerated(_example("int8").main(out=str(tmp_path / "int8")))


def test_example_finetune(tmp_path):
    losses = _example("finetune").main(str(tmp_path), "2")
    assert len(losses) == 2 and (tmp_path / "model.safetensors").is_file()


def test_example_lora(tmp_path):
    losses, model = _example("lora").main(str(tmp_path), "3")
    assert len(losses) == 3 and (tmp_path / "adapter_model.safetensors").is_file()
    assert min(float(x.abs().sum()) for name, x in model.named_parameters() if "lora_B" in name) > 0


def test_example_sft_trl(tmp_path):
    pytest.importorskip("trl")
    losses = _example("sft_trl").main(str(tmp_path), "2")
    assert len(losses) == 2 and min(losses) > 0 and (tmp_path / "model.safetensors").is_file()


def test_example_grpo_trl(tmp_path):
    pytest.importorskip("trl")
    rewards = _example("grpo_trl").main(str(tmp_path), "2")
    assert len(rewards) == 2 and max(rewards) > 0 and (tmp_path / "model.safetensors").is_file()


def test_example_quantize_and_serve():
    assert _example("quantize_and_serve").main(question="Read the digits from left to right.") == "8 6 9"


def test_example_captions(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        shutil.copy(digits.SAMPLE, tmp_path / name)
    assert _example("captions").main(str(tmp_path), batch=2) == dict.fromkeys(("a.png", "b.png", "c.png"), "8 6 9")


def test_example_embeddings(tmp_path):
    question = scenes.held_out_questions(2)[1]
    question.image.save(tmp_path / "other.png")
    found = _example("embeddings").main("digits", *map(str, (digits.SAMPLE, digits.SAMPLE, tmp_path / "other.png")))
    products = found @ found.T
    assert products[0, 1] > 0.9999 > products[0, 2] > -1 and products.diagonal().allclose(products.new_ones(3))


def test_example_kernels_in_llama():
    assert _example("kernels_in_llama").main() < 1e-4


def test_every_example_is_tested():
    named = {name.removeprefix("test_example_") for name in globals() if name.startswith("test_example_")}
    files = list((ROOT / "examples").glob("*.py"))
    assert {file.stem for file in files} == named
    assert all(len(file.read_text().splitlines()) <= 60 for file in files)


# Messages

GAP = "…"  # stands for the values of a message
NOT_FOR_USERS = ("testing.py",)
# Calls that show a message: warnings, what a capacity check finds, what qvl doctor finds.
SHOWS = re.compile(r"warnings\.warn|logger\.warning(_once)?|report\.add|wrong\.append")
SECOND = {"_Refused", "report.add"}  # whose second argument is the message
# Thrown where Python passes codes of its own; nobody who calls a public function sees them.
INTERNAL = {
    f"dtype code must be 0 (fp32), 1 (bf16) or 2 (fp16), got {GAP}",
    f"format must be 0 (dense), 1 (int8) or 2 (int4), got {GAP}",
    "weight must be int8 or int4",
    f"module {GAP} has no attribute {GAP}",
    "decoder_layers: every layer needs an output and a cache",
}


def _documented() -> list[str]:
    cells = [line.split(" | ")[0] for line in _text("docs/troubleshooting.md").splitlines() if line.startswith("| `")]
    return [message.strip() for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def _message(node: ast.expr | None, constants: dict[str, str]) -> str:
    """The text of a message, with GAP for values."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr():
            return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
        case ast.BinOp():
            return _message(node.left, constants) + _message(node.right, constants)
        case ast.Name(id=name):
            return constants.get(name, GAP)
    return GAP


def _raised() -> dict[str, str]:
    """Messages of raise, of the calls that show one, and of the extension -> the file."""
    found = {}
    for file in [*ROOT.glob("qvl_model/**/*.py"), *ROOT.glob("qvl_kernels/**/*.py")]:
        tree = ast.parse(file.read_text())
        constants = {
            node.targets[0].id: _message(node.value, {})
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            if isinstance(node, ast.Raise) or SHOWS.fullmatch(name):
                text = call.args[name in SECOND]
                for each in (text.body, text.orelse) if isinstance(text, ast.IfExp) else (text,):
                    found[_message(each, constants)] = file.name
    for file in ROOT.glob("csrc/**/*.*"):
        for thrown in re.findall(r"throw [\w:]+\((.*?)\);", file.read_text(), flags=re.DOTALL):
            found[_thrown(thrown)] = file.name
    return found


def _thrown(code: str) -> str:
    """The text of a message in C++, with GAP for values: literals that stand side by side are one."""
    parts = re.split(r'"((?:[^"\\]|\\.)*)"', code)  # literals are at the odd places
    return "".join(part if i % 2 else GAP if part.strip() else "" for i, part in enumerate(parts))


def test_messages_are_found():
    assert _thrown('"a " + std::to_string(b) +\n "c "\n "d"') == f"a {GAP}c d"
    found = _raised()
    for file in (
        "configuration.py",
        "inputs.py",
        "structure.py",
        "doctor.py",
        "attention.cpp",
        "linear.cpp",
        "common.h",
        "dispatch.cpp",
    ):
        assert file in found.values(), file
    assert found.keys() >= INTERNAL


def test_every_message_has_a_way_out():
    patterns = [re.compile(".*".join(map(re.escape, text.split(GAP))), re.DOTALL) for text in _documented()]
    missing = {
        message: file
        for message, file in _raised().items()
        if re.search(r"[a-z]{3}.*[a-z]{3} ", message)  # messages of values alone repeat another message
        and message != f"qvl_kernels: {GAP}"
        and file not in NOT_FOR_USERS
        and message not in INTERNAL
        and not any(pattern.match(message) for pattern in patterns)
    }
    assert not missing, "docs/troubleshooting.md lacks these messages"


def test_every_way_out_has_its_message():
    texts = [_text("Makefile"), _text("setup.py"), *(file.read_text() for file in ROOT.glob("csrc/**/*.cpp"))]
    for file in [*ROOT.glob("qvl_model/**/*.py"), *ROOT.glob("qvl_kernels/**/*.py")]:
        texts += [
            _message(node, {})
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant | ast.JoinedStr)
        ]
    everything = "\n".join(texts)
    gone = [text for text in _documented() if any(part.strip() not in everything for part in text.split(GAP))]
    assert not gone, "docs/troubleshooting.md names messages that do not exist"
