"""The command line: ``qvl generate`` answers a question about pictures, ``qvl inspect`` says what would be replaced."""

import argparse
import os
import sys
import time
from pathlib import Path

__all__ = ["main"]

RANDOM_KEY = "qvl_random_weights"  # set in the config of checkpoints that were never trained


class CommandError(Exception):
    """A mistake of the user: its message is printed, without a traceback."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2 for a mistake in the arguments).

    Example:
        >>> main(["generate", "--image", "digits.png", "--prompt", "Read the digits from left to right."])
    """
    parser = argparse.ArgumentParser(prog="qvl", description="Qwen3-VL, accelerated.")
    commands = parser.add_subparsers(required=True)
    generate = commands.add_parser("generate", help="answer a prompt about pictures, streaming the text")
    generate.add_argument("--model", help="checkpoint directory (default: the digits model that ships with qvl)")
    generate.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help="pictures, in order")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--stock", action="store_true", help="run transformers' own code, for comparison")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    generate.set_defaults(run=_generate)
    inspect = commands.add_parser("inspect", help="list what accelerate replaces in a checkpoint")
    inspect.add_argument("model", metavar="MODEL", help="checkpoint directory")
    inspect.set_defaults(run=_inspect)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        arguments.run(arguments)
    except CommandError as error:
        print(f"qvl: {error}", file=sys.stderr)
        return 2
    return 0


def _checkpoint(path: str | None) -> Path:
    from qvl_model import digits

    checkpoint = Path(path) if path is not None else digits.CHECKPOINT
    if not checkpoint.is_dir():
        raise CommandError(f"{checkpoint} is not a directory; give a checkpoint as save_pretrained writes it")
    if not (checkpoint / "config.json").is_file():
        raise CommandError(f"{checkpoint} has no config.json; give a checkpoint as save_pretrained writes it")
    return checkpoint


def _config(checkpoint: Path):
    from transformers import AutoConfig, Qwen3VLConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(f"{checkpoint}/config.json cannot be read: {_one_line(error)}") from error
    if not isinstance(config, Qwen3VLConfig):
        raise CommandError(f"{checkpoint} is a {config.model_type} model; qvl runs qwen3_vl")
    return config


def _images(files: list[str]) -> list:
    from PIL import Image, UnidentifiedImageError

    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise CommandError(f"cannot read picture {file}: {_one_line(error)}") from error
    return images


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _load(checkpoint: Path):
    """(model, processor) of a checkpoint directory; CommandError unless every weight of the model is in it."""
    from safetensors import SafetensorError
    from transformers import Qwen3VLForConditionalGeneration

    from qvl_model.processing import load_processor

    try:
        processor = load_processor(checkpoint)
        model, info = Qwen3VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError) as error:
        # transformers checks little of what it reads: a file of the wrong shape surfaces as any of these.
        raise CommandError(f"{checkpoint} cannot be loaded: {_one_line(error)}") from error
    # transformers fills such weights with random numbers and goes on; the answer would be noise.
    for problem, keys in (("lacks", info["missing_keys"]), ("has another size than config.json says for", info["mismatched_keys"])):
        if keys:
            first = min(key if isinstance(key, str) else key[0] for key in keys)
            raise CommandError(f"{checkpoint} {problem} {len(keys)} of the model's weights, such as {first}; save it again")
    if processor.chat_template is None:
        raise CommandError(f"{checkpoint} has no chat template; put its chat_template.jinja or chat_template.json there")
    return model.eval(), processor


class _TimedStreamer:
    """A TextStreamer that notes when each token arrived."""

    def __init__(self, tokenizer):
        from transformers import TextStreamer

        self._streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._prompt_seen = False
        self.times: list[float] = []

    def put(self, value) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    checkpoint = _checkpoint(arguments.model)
    images = _images(arguments.image)
    config = _config(checkpoint)
    import torch
    import transformers

    import qvl_model

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, processor = _load(checkpoint)
    try:
        if not arguments.stock:
            model = qvl_model.accelerate(model)
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": arguments.prompt}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        inputs = processor(images=images or None, text=[prompt], return_tensors="pt")
    except (ValueError, TypeError) as error:  # what accelerate refuses; pictures and prompts that the processor refuses
        raise CommandError(_one_line(error)) from error
    streamer = _TimedStreamer(processor.tokenizer)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, streamer=streamer)
    _print_speed(start, streamer.times, "stock" if arguments.stock else "accelerated")
    if getattr(config, RANDOM_KEY, False):
        print("The weights of this checkpoint are random: the text above is noise.", file=sys.stderr)


def _print_speed(start: float, times: list[float], variant: str) -> None:
    line = f"[{variant}] first token after {times[0] - start:.2f} s"
    if len(times) > 1:
        line += f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tok/s"
    print(line, file=sys.stderr)


def _inspect(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    import qvl_model

    config = _config(_checkpoint(arguments.model))
    with torch.device("meta"):  # the structure is enough: no weight is read
        model = Qwen3VLForConditionalGeneration(config)
    print(qvl_model.report(model))


if __name__ == "__main__":
    sys.exit(main())
