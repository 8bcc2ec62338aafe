"""``qvl serve``: an OpenAI-compatible endpoint."""

import argparse
import socket
import sys

from qvl_model.cli import models
from qvl_model.cli.errors import CommandError

__all__ = ["add", "run"]

EXAMPLES = """examples:
  qvl serve --model DIR --weights int8
  curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "Hello"}]}'

Routes: /v1/chat/completions (with images as data: URLs, and streams), /v1/models, /health, /metrics.
"""


def add(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "serve",
        help="answer requests of OpenAI's clients",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models.add_model(parser)
    default = "(default: %(default)s)"
    parser.add_argument("--host", default="127.0.0.1", help=f"address to listen on {default}")
    parser.add_argument("--port", type=int, default=8000, help=f"0 takes a free one {default}")
    parser.add_argument("--name", help="name of the model for clients (default: that of its directory)")
    parser.add_argument("--api-key", metavar="KEY", help="what clients must send (default: none)")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help=f"requests answered at once {default}")
    parser.add_argument("--queue", type=int, default=64, metavar="N", help=f"requests that may wait {default}")
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N", help=f"of an answer {default}")
    parser.add_argument("--max-body", type=int, default=20, metavar="MB", help=f"of a request {default}")
    parser.add_argument("--max-pixels", type=int, default=20, metavar="M", help=f"of an image, in millions {default}")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help=f"seconds for an answer {default}")
    parser.add_argument("--fetch", action="store_true", help="take images from http(s) URLs of public addresses too")
    return parser


def run(arguments: argparse.Namespace) -> None:
    for option in ("rows", "queue", "max_tokens", "max_body", "max_pixels", "timeout"):
        if not getattr(arguments, option) > 0:
            raise CommandError(f"--{option.replace('_', '-')} must be above 0, got {getattr(arguments, option)}")
    try:
        import uvicorn

        from qvl_model.serving import Engine, Limits, build_app
    except ImportError as error:
        raise CommandError(f"serving needs more packages: pip install 'qvl[serve]' ({error})") from error
    loaded = models.load(arguments.model, weights=arguments.weights, threads=arguments.threads)
    limits = Limits(
        max_body=arguments.max_body << 20,
        max_pixels=arguments.max_pixels * 10**6,
        max_tokens=arguments.max_tokens,
        timeout=arguments.timeout,
        fetch=arguments.fetch,
        api_key=arguments.api_key,
    )
    name = (arguments.name or arguments.model or "digits").rstrip("/").rpartition("/")[2]
    try:
        listener = socket.create_server((arguments.host, arguments.port))
    except (OSError, OverflowError) as error:
        raise CommandError(f"cannot listen on {arguments.host}:{arguments.port}: {error}") from error
    engine = Engine(loaded, max_waiting=arguments.queue, max_rows=arguments.rows)
    config = uvicorn.Config(build_app(engine, name, limits), log_level="warning", timeout_graceful_shutdown=5)
    port = listener.getsockname()[1]
    print(f"{name} on http://{arguments.host}:{port}/v1; Ctrl-C ends it", file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listener])
