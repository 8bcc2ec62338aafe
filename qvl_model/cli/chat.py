"""``qvl chat``: a conversation with one model, whose KV cache is kept from turn to turn."""

import argparse
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qvl_model.cli import answers, models
from qvl_model.cli.errors import CommandError
from qvl_model.cli.generate import images_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Chat", "add", "run"]

HELP = """/image FILE   show an image with the next question
/reset        forget the conversation
/help         this list
/exit         leave, as Ctrl-D does"""


def add(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "chat",
        help="talk to a model about images",
        epilog=f"in the chat:\n{HELP}\nCtrl-C stops an answer, and what came of it stays in the conversation.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models.add_model(parser)
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="FILE", help="for the first question"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt (default: that of the chat template)")
    answers.add_sampling(parser)
    parser.set_defaults(max_new_tokens=1024)
    return parser


class Chat:
    """A conversation and the KV cache of its tokens so far."""

    def __init__(self, loaded: models.Loaded, options: dict[str, Any], system: str | None = None) -> None:
        self.loaded, self.options, self.system = loaded, options, system
        self.waiting: list = []  # images for the next question
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation."""
        self.conversation = answers.Conversation()
        if self.system:
            self.conversation.messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        self._cache: Any = None
        self._cached: Tensor | None = None  # ids of the tokens whose keys and values are in the cache
        self._images = 0  # of the conversation, that are in the cache

    def ask(self, text: str) -> answers.Answer:
        """The answer to the next question, printed as it comes; the images that wait go with it.

        Raises: CommandError for what the processor refuses; the conversation is then as it was.
        """
        before = len(self.conversation.messages), len(self.conversation.images)
        self.conversation.ask(text, self.waiting)
        try:
            inputs = answers.inputs_of(self.loaded, [self.conversation])
        except CommandError:
            del self.conversation.messages[before[0] :], self.conversation.images[before[1] :]
            raise
        finally:
            self.waiting = []
        found, ids = self._generate(inputs)
        self.conversation.reply(found.text)
        return found

    def _generate(self, inputs: "Mapping[str, Tensor]") -> tuple[answers.Answer, "Tensor"]:
        from transformers import DynamicCache

        from qvl_model.compat import CACHE

        keep = self._common(inputs["input_ids"][0])
        if keep:
            surplus = self._cache.get_seq_length() - keep
            if surplus:
                self._cache.crop(-surplus)
            # The images are in the cache; their positions stay with the model.
            given: Mapping[str, Tensor] = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        else:
            self._cache, given = DynamicCache(config=self.loaded.model.config), inputs
        stop = _Interrupted()
        with stop:
            found, ids = answers.answer(
                self.loaded,
                given,
                self.options,
                lambda text: print(text, end="", flush=True),
                stopping_criteria=[stop],
                **{CACHE: self._cache},
            )
        if stop.asked:
            found.finish_reason = "interrupted"
        self._cached, self._images = ids[0, : self._cache.get_seq_length()], len(self.conversation.images)
        return found, ids

    def _common(self, ids: "Tensor") -> int:
        """How many tokens of the cache the next prompt begins with; 0 where it has new images."""
        if self._cached is None or len(self.conversation.images) != self._images:
            return 0
        length = min(len(ids) - 1, len(self._cached))
        differ = (ids[:length] != self._cached[:length]).nonzero()
        return int(differ[0]) if len(differ) else length


class _Interrupted:
    """A stopping criterion that Ctrl-C meets, while it is entered; a second Ctrl-C ends the program."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self, input_ids: "Tensor", scores: "Tensor", **_: object) -> "Tensor":
        import torch

        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device, dtype=torch.bool)


def run(arguments: argparse.Namespace) -> None:
    options = answers.sampling_of(arguments)
    images = images_of(arguments.image)
    loaded = models.load(arguments.model, weights=arguments.weights, threads=arguments.threads)
    _edit_lines()
    chat = Chat(loaded, options, arguments.system)
    chat.waiting = images
    if sys.stdin.isatty():
        print(f"{loaded.path.name}; /help lists the commands", file=sys.stderr)
    if loaded.random:
        print("The weights of this checkpoint are random: its answers are noise.", file=sys.stderr)
    while (line := _line()) is not None:
        if not line:
            continue
        try:
            if line.startswith("/"):
                if not _command(chat, line):
                    return
                continue
            found = chat.ask(line)
        except CommandError as error:
            print(f"qvl: {error}", file=sys.stderr)
            continue
        print()
        if found.finish_reason != "stop":
            what = "stopped" if found.finish_reason == "interrupted" else "cut: --max-new-tokens"
            print(f"[{what} after {found.completion_tokens} tokens]", file=sys.stderr)


def _command(chat: Chat, line: str) -> bool:
    """Whether the chat goes on after a line that begins with a slash."""
    name, _, value = line.partition(" ")
    if name in ("/exit", "/quit"):
        return False
    if name == "/image":
        chat.waiting += images_of([value.strip().strip("'\"")])
        print(f"[{len(chat.waiting)} image(s) go with the next question]", file=sys.stderr)
    elif name == "/reset":
        chat.reset()
        chat.waiting = []
        print("[the conversation is empty]", file=sys.stderr)
    else:
        print(HELP, file=sys.stderr)
    return True


def _edit_lines() -> None:
    """Arrow keys and history on a terminal, where Python was built with it."""
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401  input() uses it once it is imported
        except ImportError:
            pass


def _line() -> str | None:
    """The next line, stripped; None at the end of the input. Ctrl-C clears the line."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        return input(prompt).strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""
