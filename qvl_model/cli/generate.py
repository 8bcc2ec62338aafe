"""``qvl generate``: one question, about images or none."""

import argparse
import json
import sys
from pathlib import Path

from qvl_model.cli import answers, models
from qvl_model.cli.errors import CommandError

__all__ = ["add", "run"]

EXAMPLES = """examples:
  qvl generate --image photo.jpg --prompt "What is this?"
  qvl generate --model Qwen/Qwen3-VL-2B-Instruct --image a.jpg b.jpg --prompt "Which is older?" --weights int8
  echo "Why is the sky blue?" | qvl generate --model DIR --prompt - --temperature 0.7 --seed 1 --json
"""


def add(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "generate",
        help="answer a prompt about images, streaming the text",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models.add_model(parser)
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help="images, in order")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the question; - reads it from standard input")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file that holds the question")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt (default: that of the chat template)")
    answers.add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, tokens, times, finish reason")
    parser.add_argument("--quiet", action="store_true", help="print the answer only, no speed")
    parser.add_argument("--stock", action="store_true", help="run transformers' own code, for comparison")
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.stock and arguments.weights:
        raise CommandError("--stock runs the weights as they are stored; leave --weights out")
    options = answers.sampling_of(arguments)
    prompt = _prompt(arguments)
    images = images_of(arguments.image)
    loaded = models.load(arguments.model, weights=arguments.weights, stock=arguments.stock, threads=arguments.threads)
    inputs = answers.inputs_of(loaded, [answers.Conversation.of(prompt, images, arguments.system)])
    show = _nothing if arguments.json else _show
    found, _ = answers.answer(loaded, inputs, options, show)
    variant = "stock" if arguments.stock else "accelerated"
    if arguments.json:
        speed = found.tokens_per_second
        print(
            json.dumps(
                {
                    "text": found.text,
                    "finish_reason": found.finish_reason,
                    "prompt_tokens": found.prompt_tokens,
                    "completion_tokens": found.completion_tokens,
                    "seconds_to_first_token": round(found.seconds_to_first_token, 4),
                    "tokens_per_second": speed and round(speed, 2),
                    "seconds": round(found.seconds, 4),
                    "model": str(loaded.path),
                    "variant": variant,
                },
                ensure_ascii=False,
            )
        )
    else:
        print()
    if not arguments.quiet:
        _print_notes(found, variant)
    if loaded.random:
        print("The weights of this checkpoint are random: the text above is noise.", file=sys.stderr)


def images_of(files: list[str]) -> list:
    """Raises: CommandError for a file that is no image."""
    from qvl_model.images import load_image

    try:
        return [load_image(file) for file in files]
    except ValueError as error:
        raise CommandError(str(error)) from error


def _prompt(arguments: argparse.Namespace) -> str:
    try:
        if arguments.prompt_file is not None:
            return Path(arguments.prompt_file).read_text(encoding="utf-8").strip()
        return sys.stdin.read().strip() if arguments.prompt == "-" else arguments.prompt
    except (OSError, UnicodeDecodeError, ValueError) as error:
        where = arguments.prompt_file or "standard input"
        raise CommandError(f"the prompt in {where} cannot be read as text: {' '.join(str(error).split())}") from error


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _nothing(text: str) -> None:
    pass


def _print_notes(found: answers.Answer, variant: str) -> None:
    line = f"[{variant}] first token after {found.seconds_to_first_token:.2f} s"
    if found.tokens_per_second is not None:
        line += f", then {found.tokens_per_second:.1f} tok/s"
    print(line, file=sys.stderr)
    if found.finish_reason == "length":
        print(f"[cut after {found.completion_tokens} tokens: a larger --max-new-tokens gives more]", file=sys.stderr)
