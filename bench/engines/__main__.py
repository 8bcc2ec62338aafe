"""python -m bench.engines: prepares the engines that the benchmark compares with, under its cache; reuses what is
complete.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import inputs
from bench.client import ROOT
from bench.engines import Engine, engines_of, prepared

__all__ = ["main"]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        help="names of engines, or how they begin, as in 'llama.cpp' or 'openvino int8' (default: all)",
    )
    parser.add_argument(
        "--model", type=Path, help="a Qwen3-VL checkpoint; default: the 2B architecture with random weights, cached"
    )
    parser.add_argument(
        "--try", dest="attempt", action="store_true", help="afterwards let each generate once and print its times"
    )
    return parser.parse_args(argv)


def _checkpoint() -> Path:
    """The cached one; written first if it is missing."""
    command = [sys.executable, "-m", "bench.checkpoint"]
    return Path(
        subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    )


def _save_prompts(checkpoint: Path, file: Path) -> None:
    """The benchmark's inputs at their default sizes."""
    from qvl_model.processing import load_processor

    processor = load_processor(str(checkpoint))
    image = inputs.image_prompt(processor, inputs.photographs(448)[:1], 66)
    inputs.save({"image": image, "text": inputs.text_prompt(processor, image["input_ids"].shape[1])}, file)


def _try(engine: Engine, prompts: Path) -> None:
    import torch

    with engine.start(prompts, torch.get_num_threads()) as worker:
        worker.ask("warm_up")
        for prompt in engine.prompts[:2]:
            times = worker.ask("generate", prompt=prompt, tokens=33)
            print(
                f"{engine.name}: {prompt} prompt {times['first']:.2f} s, then {1 / times['per_token']:.2f} tok/s",
                flush=True,
            )
        print(f"{engine.name}: peak RSS {worker.ask('peak_rss') / 1e9:.2f} GB", flush=True)


def main(argv: list[str] | None = None) -> int:
    """0, or 1 if an engine was skipped."""
    arguments = _arguments(argv)
    checkpoint = arguments.model.resolve() if arguments.model else _checkpoint()
    if not (checkpoint / "config.json").is_file():
        sys.exit(f"bench.engines: {checkpoint} has no config.json; --model takes the folder of a Qwen3-VL checkpoint")
    engines = [engine for engine in engines_of(checkpoint) if engine.name.startswith(tuple(arguments.names) or "")]
    if not engines:
        sys.exit(
            f"bench.engines: no engine is called {' or '.join(arguments.names)}; there are "
            f"{', '.join(engine.name for engine in engines_of(checkpoint))}"
        )
    ready, skipped = prepared(engines, lambda text: print(text, flush=True))
    for engine in ready:
        print(f"{engine.name}: ready ({engine.version})", flush=True)
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}", flush=True)
    if arguments.attempt:
        with tempfile.TemporaryDirectory(prefix="qvl-engines-") as folder:
            prompts = Path(folder) / "prompts.safetensors"
            _save_prompts(checkpoint, prompts)
            for engine in ready:
                _try(engine, prompts)
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
