"""Models as commands name them: a directory, one that ships, or one of the Hugging Face hub; and loading them."""

import argparse
import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qvl_model.cli.errors import CommandError, reading_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Loaded", "add_model", "checkpoint_of", "config_of", "load", "read_weights"]

RANDOM_KEY = "qvl_random_weights"  # set in the config of checkpoints that were never trained
HELP = "checkpoint directory, a name on the Hugging Face hub, or a model that ships: digits, qvl-tiny"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TEMPLATE_SECONDS = 5.0  # to render one question
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # of a repository on the hub


class Loaded(NamedTuple):
    """A model that is ready to answer."""

    path: Path
    model: Any
    processor: Any
    random: bool  # its weights were never trained


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model answers, and how it runs."""
    parser.add_argument("--model", help=f"{HELP} (default: digits)")
    parser.add_argument(
        "--weights",
        choices=("int8", "int4"),
        help="quantise the weights in memory; qvl quantize does it once and for all (default: as stored)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one for each core)")


def checkpoint_of(name: str | None) -> Path:
    """The directory of a model; one of the hub is fetched where it is not in the cache.

    Raises: CommandError if there is none.
    """
    from qvl_model import digits

    if name is not None and name.endswith(".gguf"):
        raise CommandError(f"{name} is a GGUF file; qvl loads the checkpoint in safetensors that it was made from")
    checkpoint = digits.checkpoint(name)
    if not checkpoint.exists() and name is not None and HUB_NAME.fullmatch(name):
        checkpoint = _from_hub(name)
    if not checkpoint.is_dir():
        raise CommandError(
            f"{checkpoint} is not a directory; give a checkpoint as save_pretrained writes it, a name on the hub, or "
            f"one that ships: {', '.join(digits.SHIPPED)}"
        )
    if not (checkpoint / "config.json").is_file():
        raise CommandError(f"{checkpoint} has no config.json; give a checkpoint as save_pretrained writes it")
    return checkpoint


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except GatedRepoError as error:
        raise CommandError(f"{name} asks for an agreement on the hub first; then: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise CommandError(f"{name} is neither a directory nor a public model on the hub") from error
    except Exception as error:  # of whichever library makes the connection
        raise CommandError(
            f"{name} is no directory here, and the hub cannot be reached; where it can: hf download {name} --local-dir "
            f"{name.rpartition('/')[2]}, then give that directory"
        ) from error


def config_of(checkpoint: Path) -> "PreTrainedConfig":
    """The configuration of a checkpoint. From here on transformers prints no advice and no progress.

    Raises: CommandError for a config.json that is none of a model that qvl runs.
    """
    from transformers.utils import logging

    from qvl_model.checkpoint_files import load_config, one_line

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load_config(checkpoint)
    except (OSError, ValueError) as error:
        raise CommandError(one_line(error)) from error


def read_weights(checkpoint: Path, weights: str | None = None) -> Any:
    """(model, loading info with missing, mismatched and unexpected keys) of a checkpoint directory; ``weights``: format
    of weights that are fp8 in the file.
    """
    from transformers import AutoModelForImageTextToText

    from qvl_model import pretrained
    from qvl_model.checkpoint_files import one_line
    from qvl_model.quantization.convert import is_quantized_checkpoint

    _check_files(checkpoint)
    try:
        if is_quantized_checkpoint(checkpoint):
            return pretrained.load(checkpoint, output_loading_info=True, weights=weights)
        return AutoModelForImageTextToText.from_pretrained(
            checkpoint,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except reading_errors() as error:
        raise CommandError(f"{checkpoint} cannot be loaded: {one_line(error)}") from error


def _check_files(checkpoint: Path) -> None:
    """Raises: CommandError for weights of which only a pointer or a part was downloaded."""
    for file in checkpoint.glob("*.safetensors"):
        with open(file, "rb") as stream:
            begin = stream.read(64)
        if begin.startswith(b"version https://git-lfs"):
            raise CommandError(
                f"{file} is a pointer of Git LFS, not weights; fetch them in its repository: git lfs pull"
            )
    for pattern in ("*.incomplete", "*.part", "*.crdownload", "*.aria2"):
        for file in checkpoint.glob(pattern):
            raise CommandError(f"{file} is a download that has not ended; finish it, or remove the file")


def _check_template(checkpoint: Path, processor: Any) -> None:
    """Raises: CommandError for a chat template that cannot render a question, takes for ever, or multiplies texts,
    which fills the memory in one step.
    """
    from jinja2 import Environment, TemplateError, nodes

    from qvl_model.checkpoint_files import one_line

    reason = f"the chat template of {checkpoint} cannot be used: "
    try:
        templates = processor.chat_template
        for text in templates.values() if isinstance(templates, dict) else [templates]:
            text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)  # a tag of transformers' own
            parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
            if next(parsed.find_all((nodes.Mul, nodes.Pow)), None) is not None:
                raise CommandError(f"{reason}it multiplies, which may fill the memory")
        with time_limit(TEMPLATE_SECONDS):
            content = [{"type": "image"}, {"type": "text", "text": "x"}]
            processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise CommandError(f"{reason}{one_line(error)}") from error
    except TimeoutError as error:
        raise CommandError(f"{reason}it takes more than {TEMPLATE_SECONDS:g} s") from error


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises: TimeoutError in the block after so many seconds; in the main thread only, where signals arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load(name: str | None, *, weights: str | None = None, stock: bool = False, threads: int | None = None) -> Loaded:
    """The model and processor that a command named, accelerated unless ``stock``.

    Raises: CommandError, also if a weight is missing or not finite.
    """
    checkpoint = checkpoint_of(name)  # mistakes in names are told before PyTorch is imported
    import torch

    from qvl_model import api, capacity
    from qvl_model.checkpoint_files import one_line, read_mapping
    from qvl_model.config_check import check_generation
    from qvl_model.processing import load_processor
    from qvl_model.quantization.convert import is_quantized_checkpoint, method_of

    if threads is not None:
        if threads < 1:
            raise CommandError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    config = config_of(checkpoint)
    fp8 = method_of(checkpoint) == "fp8"
    if is_quantized_checkpoint(checkpoint) and (stock or weights and not fp8):
        option = "--stock" if stock else "--weights"
        raise CommandError(
            f"{checkpoint} holds quantised weights, which stock transformers cannot run and qvl runs as they are; "
            f"leave {option} out"
        )
    try:
        if (file := checkpoint / "generation_config.json").exists():
            read_mapping(file)  # transformers would take its defaults in the place of a broken one
        processor = load_processor(checkpoint)
    except reading_errors() as error:
        raise CommandError(f"{checkpoint} cannot be loaded: {one_line(error)}") from error
    for kind in ("image", "video"):
        theirs, ours = (getattr(of, f"{kind}_token_id", None) for of in (processor, config))
        if theirs is not None and theirs != ours:
            raise CommandError(
                f"{checkpoint}/config.json: {kind}_token_id is {ours}, and its tokenizer writes {kind}s as {theirs}"
            )
    model, info = read_weights(checkpoint, weights if fp8 and weights == "int8" else None)
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
        check_generation(model.generation_config, config.get_text_config().vocab_size)
    except ValueError as error:
        raise CommandError(f"{checkpoint}/generation_config.json: {error}") from error
    try:
        capacity.check_finite(model, checkpoint)
        if not stock:
            model = api.accelerate(model, weights=weights)
    except (ValueError, TypeError) as error:
        raise CommandError(one_line(error)) from error
    if not processor.chat_template:
        raise CommandError(
            f"{checkpoint} has no chat template; put its chat_template.jinja or chat_template.json there"
        )
    _check_template(checkpoint, processor)
    return Loaded(checkpoint, model.eval(), processor, bool(getattr(config, RANDOM_KEY, False)))
