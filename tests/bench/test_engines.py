"""Other engines of the benchmark: how they are prepared, skipped and queried. No network is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from bench import inputs
from bench.checkpoint_files import FULL_CONFIG
from bench.client import Worker, WorkerError
from bench.engines import EngineUnavailable, engines_of, llama_cpp, open_vino, prepared
from bench.engines.__main__ import main
from bench.engines.checkpoints import old_config, old_style
from bench.engines.environment import Environment, finished, run_step
from bench.engines.llama_cpp import IK_LLAMA_CPP, LLAMA_CPP, LlamaEngine, Toolchain
from bench.engines.llama_worker import seconds
from bench.engines.open_vino import OpenVINOEngine
from bench.engines.write_gguf import metadata, read_tensors, tensor_name
from bench.greedy import CONFIGS, tiny_config

FORMATS = ["bf16", "Q8_0", "Q4_0"]


def _bench_output(prompt: int, tokens: int) -> list[dict]:
    """Output of llama-bench: the fields that are read, and two that are not."""
    tests = [
        {"n_prompt": prompt, "n_gen": 0, "avg_ns": 4_000_000_000, "avg_ts": prompt / 4, "samples_ns": [4_000_000_000]}
    ]
    return tests + (
        [
            {
                "n_prompt": 0,
                "n_gen": tokens,
                "avg_ns": tokens * 125_000_000,
                "avg_ts": 8.0,
                "samples_ns": [tokens * 125_000_000],
            }
        ]
        if tokens
        else []
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random checkpoint whose rows are whole blocks of llama.cpp's formats."""
    text, vision, _ = CONFIGS[-1]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("peers") / "tiny"
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(**tiny_config(text, vision))).to(torch.bfloat16).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def prompts(tmp_path):
    """A file of a text prompt of 7 tokens."""
    file = tmp_path / "prompts.safetensors"
    ids = torch.arange(10, 17)[None]
    inputs.save({"text": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}, file)
    return file


def test_prompts_are_handed_over_without_what_old_versions_refuse(tmp_path):
    image = {
        "input_ids": torch.tensor([[1, 2]]),
        "mm_token_type_ids": torch.tensor([[0, 1]]),
        "pixel_values": torch.rand(4, 6).t(),
    }
    inputs.save({"image": image, "text": {"input_ids": torch.tensor([[3]])}}, tmp_path / "prompts")
    loaded = inputs.load(tmp_path / "prompts")
    assert loaded.keys() == {"image", "text"} and loaded["image"].keys() == {"input_ids", "pixel_values"}
    assert torch.equal(loaded["image"]["pixel_values"], image["pixel_values"]) and loaded["text"][
        "input_ids"
    ].tolist() == [[3]]


def test_times_of_llama_bench():
    assert seconds(json.dumps(_bench_output(262, 32)), 33) == {"first": 4.0, "per_token": 0.125}
    assert seconds(json.dumps(_bench_output(262, 0)), 1) == {"first": 4.0, "per_token": None}
    with pytest.raises(ValueError, match="asked for 32 tokens after the prompt and reports 0"):
        seconds(json.dumps(_bench_output(262, 0)), 33)


def test_a_llama_peer_runs_its_bench_once_per_request(tmp_path, monkeypatch, checkpoint, prompts):
    monkeypatch.setenv("QVL_CACHE", str(tmp_path))
    engine = LlamaEngine(IK_LLAMA_CPP, "Q8_0", checkpoint)
    program = IK_LLAMA_CPP.tool("llama-bench")
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint('loading', sys.argv[1:], file=sys.stderr)\n"
        f"sys.exit(3) if '-n 8' in ' '.join(sys.argv) else print({json.dumps(_bench_output(7, 2))!r})\n"
    )
    program.chmod(0o755)
    with engine.start(prompts, threads=2) as worker:
        assert worker.ask("generate", prompt="text", tokens=3) == {"first": 4.0, "per_token": 0.125}
        assert worker.ask("peak_rss") > 1 << 20
        with pytest.raises(WorkerError, match="text only, not the image prompt"):
            worker.ask("generate", prompt="image", tokens=3)
        asked = rf"-m {engine.file} -t 2 -rtr 1 -p 7 -n 8 -r 1 -o json ended with exit code 3:\nloading"
        with pytest.raises(WorkerError, match=asked):
            worker.ask("generate", prompt="text", tokens=9)


@pytest.mark.parametrize("style", ["new", "old"])
def test_gguf_metadata_of_the_full_size(style):
    config = FULL_CONFIG if style == "new" else old_config(FULL_CONFIG)
    if style == "old":
        del config["text_config"]["rope_parameters"]
    found = metadata(config)
    assert found["qwen3vl.rope.dimension_sections"] == [24, 20, 20, 0] and found["tokenizer.ggml.model"] == "none"
    assert found["qwen3vl.rope.freq_base"] == 5e6 and isinstance(
        found["qwen3vl.attention.layer_norm_rms_epsilon"], float
    )
    assert [
        found[f"qwen3vl.{key}"]
        for key in (
            "block_count",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
            "vocab_size",
        )
    ] == [28, 2048, 6144, 16, 8, 128, 151936]


def test_every_text_tensor_has_a_gguf_name(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    names = {name: tensor_name(name) for name in tensors}
    text = {name: renamed for name, renamed in names.items() if renamed}
    assert text.keys() == {name for name in tensors if not name.startswith("model.visual.")}
    assert len(set(text.values())) == len(text) == 2 + 11 * 2
    assert names["model.language_model.layers.1.mlp.down_proj.weight"] == "blk.1.ffn_down.weight"
    assert tensor_name("lm_head.weight") == "output.weight"
    with pytest.raises(ValueError, match="no GGUF name is known for model.language_model.extra"):
        tensor_name("model.language_model.extra")


def test_tensors_are_read_as_safetensors_reads_them(checkpoint, tmp_path):
    expected = load_file(checkpoint / "model.safetensors")
    found = {name: torch.from_numpy(np.array(tensor)).view(torch.bfloat16) for name, tensor in read_tensors(checkpoint)}
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )
    header = json.dumps({"x": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"00")
    with pytest.raises(ValueError, match="is F16; only BF16"):
        list(read_tensors(tmp_path))


READ_GGUF = """
import json, sys
from gguf import GGUFReader
reader = GGUFReader(sys.argv[1])
tensors = {t.name: [t.tensor_type.name, t.shape.tolist()[::-1], bytes(t.data).hex()] for t in reader.tensors}
print(json.dumps(tensors))
"""


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("toolchain", [LLAMA_CPP, IK_LLAMA_CPP], ids=lambda toolchain: toolchain.name)
def test_llama_cpp_reads_what_is_written(toolchain, format, checkpoint, tmp_path, monkeypatch, prompts):
    if not (LLAMA_CPP.ready and toolchain.ready):
        pytest.skip(f"{toolchain.name} is not built: python -m bench.engines")
    monkeypatch.setattr(llama_cpp, "models_directory", lambda checkpoint: tmp_path)
    engine = LlamaEngine(toolchain, format, checkpoint)
    engine.prepare(print)
    with engine.start(prompts, threads=1) as worker:
        times = worker.ask("generate", prompt="text", tokens=3)
    assert times["first"] > 0 and times["per_token"] > 0
    if format == "bf16":
        output = subprocess.run(
            [LLAMA_CPP.environment.python, "-c", READ_GGUF, engine.file], capture_output=True, text=True, check=True
        ).stdout
        written = json.loads(output)
        for name, tensor in load_file(checkpoint / "model.safetensors").items():
            if renamed := tensor_name(name):
                tensor = tensor.float() if tensor.ndim == 1 else tensor.view(torch.uint16)
                assert written.pop(renamed) == [
                    "F32" if tensor.ndim == 1 else "BF16",
                    list(tensor.shape),
                    tensor.numpy().tobytes().hex(),
                ], name
        assert not written


def test_openvino_gets_the_config_of_transformers_4(checkpoint, tmp_path):
    old_style(checkpoint, tmp_path / "old")
    text = json.loads((tmp_path / "old" / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 5e6
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    assert text["rope_parameters"]["rope_theta"] == 5e6
    assert "rope_theta" not in json.loads((checkpoint / "config.json").read_text())["text_config"]
    weights = tmp_path / "old" / "model.safetensors"
    assert weights.is_symlink() and weights.samefile(checkpoint / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_openvino_runs_what_is_exported(bits, checkpoint, tmp_path, monkeypatch, prompts):
    if not open_vino.environment().ready:
        pytest.skip("OpenVINO is not installed: python -m bench.engines")
    monkeypatch.setattr(open_vino, "models_directory", lambda checkpoint: tmp_path)
    engine = OpenVINOEngine(bits, checkpoint)
    engine.prepare(print)
    with engine.start(prompts, threads=1) as worker:
        times = worker.ask("generate", prompt="text", tokens=3)
        assert times["first"] > 0 and times["per_token"] > 0 and worker.ask("peak_rss") > 1 << 27


def test_a_failed_step_says_why(tmp_path):
    log = tmp_path / "logs" / "step.log"
    run_step("speaking", [sys.executable, "-c", "print('words')"], log)
    with pytest.raises(
        EngineUnavailable, match=r"compiling failed: x.c:1: error: no such thing \(.*step.log has the rest\)"
    ):
        run_step(
            "compiling", [sys.executable, "-c", "print('x.c:1: error: no such thing\\nninja: stopped'); exit(1)"], log
        )
    with pytest.raises(EngineUnavailable, match="linking failed: last words"):
        run_step("linking", [sys.executable, "-c", "print('first\\nlast words'); exit(1)"], log)
    with pytest.raises(EngineUnavailable, match="starting failed: .*nowhere"):
        run_step("starting", ["/nowhere"], log)
    with pytest.raises(EngineUnavailable, match="waiting took longer than 0 s"):
        run_step("waiting", ["sleep", "60"], log, limit_s=0.1)
    assert "words" in log.read_text() and "$ sleep 60" in log.read_text()
    run_step("finding", ["sh", "-c", f"case $PATH in {tmp_path}:*) ;; *) exit 1;; esac"], log, path=tmp_path)


def test_an_environment_is_made_once_and_anew_for_another_recipe(tmp_path):
    shown = []
    environment = Environment(tmp_path / "env", (), "import json")
    environment.prepare(shown.append)
    assert environment.python.exists() and len(shown) == 1
    Environment(tmp_path / "env", (), "import json").prepare(shown.append)
    assert len(shown) == 1
    broken = Environment(tmp_path / "env", (("install", "--no-index", "qvl-no-such-package"),), "import json")
    for _ in range(2):
        with pytest.raises(
            EngineUnavailable, match="pip install --no-index qvl-no-such-package failed: ERROR: .*qvl-no-such-package"
        ):
            broken.prepare(shown.append)
    assert len(shown) == 3, "the second attempt must fail without trying"
    assert not broken.ready and not environment.ready


def test_what_is_unfinished_is_not_there(tmp_path):
    file = tmp_path / "folder" / "file"
    with pytest.raises(RuntimeError), finished(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert not file.exists()
    with finished(file) as temporary:
        temporary.write_text("whole")
    assert file.read_text() == "whole" and list(file.parent.iterdir()) == [file]


def test_without_a_compiler_nothing_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("QVL_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(Environment, "prepare", lambda self, show: None)
    with pytest.raises(EngineUnavailable, match="no C[+][+] compiler: apt-get install"):
        Toolchain("some.cpp", "some-package", "1.0").prepare(print)


def test_the_project_is_found_in_a_source_distribution(tmp_path, monkeypatch):
    monkeypatch.setenv("QVL_CACHE", str(tmp_path))
    toolchain = Toolchain("some.cpp", "some-package", "1.0")
    project = toolchain.folder / "source-1.0" / "some_package-1.0" / "vendor" / "my_llama.cpp"
    (project / "common").mkdir(parents=True)
    with pytest.raises(EngineUnavailable, match="some-package 1.0 carries no vendor"):
        toolchain._source()
    (project / "CMakeLists.txt").touch()
    assert toolchain._source() == project
    script = project / llama_cpp.BUILD_INFO
    assert "build-info.cpp.in" in script.read_text(), "what the distribution leaves out is added"
    script.write_text("its own")
    assert toolchain._source() == project and script.read_text() == "its own"


class _Engine:
    def __init__(self, name: str, reason: str | None) -> None:
        self.name, self._reason = name, reason

    def prepare(self, show) -> None:
        show("at work")
        if self._reason:
            raise EngineUnavailable(self._reason)


def test_peers_that_cannot_be_prepared_are_skipped_with_their_reason(checkpoint, monkeypatch, capsys):
    shown = []
    good, bad = _Engine("good", None), _Engine("bad", "no such machine")
    assert prepared([bad, good], shown.append) == ([good], {"bad": "no such machine"})
    assert shown == ["bad: at work", "good: at work"]

    def unavailable(self, show):
        raise EngineUnavailable("no network")

    monkeypatch.setattr(Environment, "prepare", unavailable)
    monkeypatch.setattr(Toolchain, "prepare", unavailable)
    assert main(["--model", str(checkpoint)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{engine.name}: skipped, no network" for engine in engines_of(checkpoint)] and len(printed) == 8
    with pytest.raises(SystemExit, match="no engine is called vllm; there are llama.cpp bf16"):
        main(["--model", str(checkpoint), "vllm"])


def test_workers_of_peers_import_nothing_of_the_main_environment():
    code = (
        "import bench.engines.llama_worker, bench.engines.llama_cpp, bench.engines.open_vino, sys; print(*sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "numpy", "qvl_kernels", "qvl_model"} & set(loaded)


def test_a_peer_that_dies_says_so():
    with Worker("a peer", command=[sys.executable, "-c", "exit('no such library')"]) as worker:
        with pytest.raises(
            WorkerError, match=r"a peer worker ended with exit code 1 during 'load'(.|\n)*no such library"
        ):
            worker.ask("load")
