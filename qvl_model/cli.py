"""The command line: ``qvl generate`` answers a question about images, ``qvl quantize`` quantises a checkpoint, ``qvl
inspect`` lists what would be replaced, ``qvl verify`` checks architecture and weights, ``qvl train`` trains a model.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_model.checkpoint_files import load_config, one_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

__all__ = ["main"]

RANDOM_KEY = "qvl_random_weights"  # set in the config of checkpoints that were never trained


class CommandError(Exception):
    """A mistake of the user: its message is printed, without a traceback."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 2 for a mistake in the arguments, 1 for a model without its full
    capacity.

    Example:
        >>> main(["generate", "--image", "digits.png", "--prompt", "Read the digits from left to right."])
    """
    parser = argparse.ArgumentParser(prog="qvl", description="Qwen3-VL, accelerated.")
    commands = parser.add_subparsers(required=True)
    generate = commands.add_parser("generate", help="answer a prompt about images, streaming the text")
    generate.add_argument("--model", help="checkpoint directory, or a model that ships: digits (default), qvl-tiny")
    generate.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help="images, in order")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--stock", action="store_true", help="run transformers' own code, for comparison")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    generate.set_defaults(run=_generate)
    quantize = commands.add_parser("quantize", help="quantise the weights of a checkpoint to int8 or int4")
    quantize.add_argument("--model", required=True, metavar="MODEL", help="checkpoint directory")
    quantize.add_argument(
        "--weights",
        nargs="+",
        default=["int8"],
        metavar="FORMAT",
        help="int8 or int4, or by part or pattern of layer names, as in: text=int4 vision=int8 *.down_proj=int8; parts "
        "not named keep their weights (default: int8)",
    )
    quantize.add_argument(
        "--group",
        type=int,
        choices=(32, 64, 128),
        help="inputs that share an int4 scale (default: 32)",
    )
    quantize.add_argument(
        "--calibrate",
        nargs="?",
        const="default",
        metavar="FILE.jsonl",
        help="choose input scales on the texts and images of the package, or on those of a file",
    )
    quantize.add_argument(
        "--bits",
        type=float,
        help="average bits per weight of parts in int4: the most sensitive layers are int8 (default: 4.85)",
    )
    quantize.add_argument("--out", required=True, metavar="DIR", help="directory to write; it must not exist yet")
    quantize.set_defaults(run=_quantize)
    inspect = commands.add_parser("inspect", help="list what accelerate replaces in a checkpoint")
    inspect.add_argument("model", metavar="MODEL", help="checkpoint directory, or a model that ships: digits, qvl-tiny")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser(
        "verify", help="check that no layer, head, channel or parameter of a checkpoint is missing or pruned"
    )
    verify.add_argument("model", metavar="MODEL", help="checkpoint directory, or a model that ships: digits, qvl-tiny")
    verify.add_argument(
        "--spec",
        metavar="SPEC",
        help="what it must be: a name (qwen3-vl-2b, qvl-2b) or the directory of another config.json (default: its own)",
    )
    verify.set_defaults(run=_verify)
    train = commands.add_parser("train", help="train a model as a YAML file says, or go on with a run that was stopped")
    train.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="the configuration")
    train.add_argument(
        "--keys", action="store_true", help="print every key of the configuration with its default and meaning"
    )
    train.set_defaults(run=_train)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return arguments.run(arguments) or 0
    except CommandError as error:
        print(f"qvl: {error}", file=sys.stderr)
        return 2


def _checkpoint(path: str | None) -> Path:
    from qvl_model import digits

    checkpoint = digits.checkpoint(path)
    if not checkpoint.is_dir():
        shipped = ", ".join(digits.SHIPPED)
        raise CommandError(
            f"{checkpoint} is not a directory; give a checkpoint as save_pretrained writes it, or one that ships: "
            f"{shipped}"
        )
    if not (checkpoint / "config.json").is_file():
        raise CommandError(f"{checkpoint} has no config.json; give a checkpoint as save_pretrained writes it")
    return checkpoint


def _config(checkpoint: Path) -> "PreTrainedConfig":
    try:
        return load_config(checkpoint)
    except (OSError, ValueError) as error:
        raise CommandError(one_line(error)) from error


def _images(files: list[str]) -> list:
    from qvl_model.images import load_image

    try:
        return [load_image(file) for file in files]
    except ValueError as error:
        raise CommandError(str(error)) from error


def _reading_errors() -> tuple[type[Exception], ...]:
    """Errors that a malformed checkpoint file may cause, since transformers checks little of what it reads."""
    from pickle import UnpicklingError

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
        StrictDataclassError,
        UnpicklingError,
    )


def _weights(checkpoint: Path) -> Any:
    """(model, loading info with missing, mismatched and unexpected keys) of a checkpoint directory."""
    from transformers import AutoModelForImageTextToText

    from qvl_model import pretrained
    from qvl_model.quantization.convert import is_quantized_checkpoint

    try:
        if is_quantized_checkpoint(checkpoint):
            return pretrained.load(checkpoint, output_loading_info=True)
        return AutoModelForImageTextToText.from_pretrained(
            checkpoint,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except _reading_errors() as error:
        raise CommandError(f"{checkpoint} cannot be loaded: {one_line(error)}") from error


def _load(checkpoint: Path) -> tuple[Any, Any]:
    """(model, processor) of a checkpoint directory. Raises: CommandError if a weight is missing or not finite."""
    from qvl_model import capacity
    from qvl_model.processing import load_processor

    try:
        processor = load_processor(checkpoint)
    except _reading_errors() as error:
        raise CommandError(f"{checkpoint} cannot be loaded: {one_line(error)}") from error
    model, info = _weights(checkpoint)
    # transformers fills such weights with random numbers; the answer would be noise.
    for problem, keys in (
        ("lacks", info["missing_keys"]),
        ("has another size than config.json says for", info["mismatched_keys"]),
    ):
        if keys:
            first = min(key if isinstance(key, str) else key[0] for key in keys)
            raise CommandError(
                f"{checkpoint} {problem} {len(keys)} of the model's weights, such as {first}; save it again"
            )
    try:
        capacity.check_finite(model, checkpoint)
    except ValueError as error:
        raise CommandError(one_line(error)) from error
    if processor.chat_template is None:
        raise CommandError(
            f"{checkpoint} has no chat template; put its chat_template.jinja or chat_template.json there"
        )
    return model.eval(), processor


class _TimedStreamer:
    """A TextStreamer that notes when each token arrived."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import TextStreamer

        self._streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._prompt_seen = False
        self.times: list[float] = []

    def put(self, value: "Tensor") -> None:
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
    from jinja2 import TemplateError

    import qvl_model
    from qvl_model.quantization.convert import is_quantized_checkpoint

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.stock and is_quantized_checkpoint(checkpoint):
        raise CommandError(
            f"{checkpoint} holds quantised weights, which stock transformers cannot run; leave --stock out"
        )
    model, processor = _load(checkpoint)
    try:
        if not arguments.stock:
            model = qvl_model.accelerate(model)
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": arguments.prompt}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(images=images or None, text=[prompt], return_tensors="pt")
    except TemplateError as error:  # includes what transformers' sandbox forbids in templates
        raise CommandError(f"the chat template of {checkpoint} cannot be used: {one_line(error)}") from error
    except (ValueError, TypeError) as error:  # from accelerate, or images and prompts that the processor refuses
        raise CommandError(one_line(error)) from error
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


def _quantize(arguments: argparse.Namespace) -> None:
    checkpoint = _checkpoint(arguments.model)
    _config(checkpoint)
    import transformers

    from qvl_model import pretrained
    from qvl_model.quantization import convert

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    try:
        formats = convert.formats_of(_weight_formats(arguments.weights))
        pretrained.quantize(checkpoint, arguments.out, formats, arguments.group, arguments.calibrate, arguments.bits)
    except _reading_errors() as error:
        raise CommandError(one_line(error)) from error
    before, after = (
        sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) for path in (checkpoint, arguments.out)
    )
    print(
        f"{arguments.out}: {after / 1e9:.2f} GB of weights, from {before / 1e9:.2f} GB, in "
        f"{time.perf_counter() - start:.0f} s"
    )


def _weight_formats(words: list[str]) -> str | dict[str, str]:
    """The argument ``weights`` of ``accelerate``, from one format or from words part=format."""
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    parts = dict(word.partition("=")[::2] for word in words)
    if len(parts) != len(words) or not all(parts.values()):
        raise CommandError(f"--weights takes one format, or part=format for each part once; got {' '.join(words)}")
    return parts


def _inspect(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    import qvl_model
    from qvl_model.quantization.convert import is_quantized_checkpoint

    checkpoint = _checkpoint(arguments.model)
    config = _config(checkpoint)
    if is_quantized_checkpoint(checkpoint):
        print(qvl_model.report(_weights(checkpoint)[0]))
        return
    with torch.device("meta"):  # the structure is enough; no weight is read
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    print(qvl_model.report(model))


def _verify(arguments: argparse.Namespace) -> int:
    import transformers

    from qvl_model import capacity

    checkpoint = _checkpoint(arguments.model)
    config = _config(checkpoint)
    spec, name = config, f"{checkpoint}/config.json"
    if arguments.spec in capacity.SPECS:
        spec, name = capacity.SPECS[arguments.spec](), arguments.spec
    elif arguments.spec is not None:
        if not Path(arguments.spec).is_dir():
            raise CommandError(
                f"--spec {arguments.spec} is neither one of {', '.join(capacity.SPECS)} nor a directory with a "
                f"config.json"
            )
        spec, name = _config(_checkpoint(arguments.spec)), f"{arguments.spec}/config.json"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, info = _weights(checkpoint)
    try:
        report = capacity.examine(model, capacity.CapacitySpec.from_config(spec, type(model), name))
    except TypeError as error:
        raise CommandError(one_line(error)) from error
    for key in sorted(info["missing_keys"]):
        report.add(key.rpartition(".")[0], f"{key.rpartition('.')[2]} is not in the checkpoint")
    for key, found, _ in sorted(info["mismatched_keys"]):
        report.add(key.rpartition(".")[0], f"{key.rpartition('.')[2]} is {list(found)} in the checkpoint")
    for key in sorted(info["unexpected_keys"]):
        report.add(
            key.rpartition(".")[0],
            f"{key.rpartition('.')[2]} is in the checkpoint, and config.json has no place for it",
        )
    print(report)
    return 0 if report.ok else 1


def _train(arguments: argparse.Namespace) -> int:
    try:
        from qvl_model import capacity, training
    except ImportError as error:  # packages that the Trainer needs
        raise CommandError(f"training needs more packages: pip install 'qvl[train]' ({one_line(error)})") from error
    if arguments.keys:
        print(training.describe_keys())
        return 0
    if arguments.config is None:
        raise CommandError("train needs a CONFIG.yaml; --keys lists what may stand in it")
    try:
        result = training.train(training.TrainConfig.from_yaml(arguments.config))
    except capacity.CapacityError as error:
        print(f"qvl: training was stopped, the model lost capacity. {error}", file=sys.stderr)
        return 1
    except (training.ConfigError, training.DataError) as error:
        raise CommandError(str(error)) from error
    except KeyboardInterrupt:
        print("\nqvl: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{result.steps} steps; the model is in {result.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
