"""python -m bench.serving: the server's engine with 1, 4 and 16 requests at once, joined and one after the other.

Without --model the random checkpoint of 2.13 B parameters answers. Requests are texts of different lengths, each
answered in --tokens tokens. Joined means up to --rows in one ``generate``, as ``qvl serve`` does it. Both ways
alternate, and the ratio is the median over their pairs. --output keeps the result as JSON.
"""

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["measure"]

AT_ONCE = (1, 4, 16)
WORDS = "describe the colours shapes and numbers that you can see in this photograph of a street in the evening".split()


def _seconds(loaded: Any, count: int, rows: int, tokens: int) -> tuple[float, float]:
    """Seconds until the last of ``count`` requests that come at once is answered, and their mean."""
    from qvl_model.cli.answers import Conversation
    from qvl_model.serving import Engine
    from qvl_model.serving.engine import End, Request

    engine = Engine(loaded, max_waiting=count, max_rows=rows)
    ended: list[float] = []
    wrong: list[End] = []
    done = threading.Semaphore(0)

    def deliver(piece: str | End) -> None:  # in the engine's thread
        if isinstance(piece, End):
            wrong.extend([piece] if piece.reason not in ("length", "stop") else [])
            ended.append(time.perf_counter())
            done.release()

    requests = [
        Request(Conversation.of(" ".join(WORDS[: 3 + index % len(WORDS)]), []), {"do_sample": False}, tokens, deliver)
        for index in range(count)
    ]
    start = time.perf_counter()
    for request in requests:  # the first one is answered alone, the others wait for it
        engine.submit(request)
    for _ in requests:
        done.acquire()
    engine.close()
    if wrong:
        raise RuntimeError(f"bench.serving: a request ended as {wrong[0].reason}: {wrong[0].message}")
    return max(ended) - start, sum(ended) / count - start


def measure(loaded: Any, *, rows: int, tokens: int, pairs: int) -> list[dict]:
    """A dictionary per number of requests: ``pairs`` of [one by one, joined] seconds until the last answer, ``mean`` of
    both until an answer, and the median ``ratio`` of the pairs.
    """
    from bench import timing

    found = []
    for count in AT_ONCE:
        runs: list[list[tuple[float, float]]] = []
        for index in range(pairs + 1):  # the first one warms up
            order = (1, rows) if index % 2 else (rows, 1)
            seconds = {limit: _seconds(loaded, count, limit, tokens) for limit in order}
            runs.append([seconds[1], seconds[rows]])
        runs = runs[1:]
        found.append(
            {
                "requests": count,
                "pairs": [[alone[0], joined[0]] for alone, joined in runs],
                "mean": [timing.median([run[side][1] for run in runs]) for side in (0, 1)],
                "ratio": timing.median([alone[0] / joined[0] for alone, joined in runs]),
            }
        )
        print(f"{count:3d} requests: joined {found[-1]['ratio']:.2f} times as fast", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a checkpoint; default: random weights of the full size, cached")
    parser.add_argument("--weights", choices=("int8", "int4"), help="quantise the weights (default: as stored)")
    parser.add_argument("--rows", type=int, default=8, help="requests answered at once, of the server (default 8)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default 32)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs (default 3)")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)

    from bench import machine
    from bench.checkpoint import random_checkpoint
    from bench.families import FAMILIES
    from qvl_model.cli import models

    model = arguments.model or str(random_checkpoint(FAMILIES["qwen3-vl"]))
    loaded = models.load(model, weights=arguments.weights)
    loaded.model.generation_config.eos_token_id = None  # random weights may end an answer at once
    rows = measure(loaded, rows=arguments.rows, tokens=arguments.tokens, pairs=arguments.pairs)
    if arguments.output:
        result = {"machine": machine.describe(), "weights": arguments.weights or "bf16", "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
