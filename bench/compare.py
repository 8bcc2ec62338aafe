"""python -m bench.compare OTHER: this checkout against another one (its extension built), interleaved pair by pair.

Each checkout runs in a process of its own, with the default random checkpoint of 2.13 B parameters. Cases: tokens per
second of ``generate``, and of a loop of one's own that calls the model token by token; tokens per second of a prompt.
The pairs go to --output as JSON; docs/performance-notes.md shows bench/results/one-loop.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

__all__ = ["measure"]

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("generate", "loop", "prompt")
PROMPT = 16  # tokens before the generated ones


class _Checkout:
    """The process of one checkout."""

    def __init__(self, tree: Path, path: Path, weights: str, threads: int) -> None:
        # -P: only the checkout's own packages, whatever folder this file lies in
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--worker", str(path), weights, str(threads)]
        self._process = subprocess.Popen(
            command, cwd=tree, env=_environment(tree), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        where = Path(self._answer())
        if where.parent.parent != tree.resolve():
            raise RuntimeError(f"bench.compare: {tree} imports qvl_kernels from {where}")

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("bench.compare: a worker ended; its error stands above")
        return json.loads(line)

    def ask(self, kind: str, rows: int, tokens: int) -> float:
        assert self._process.stdin is not None
        print(json.dumps([kind, rows, tokens]), file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree.resolve()), "HF_HUB_OFFLINE": "1"}


def measure(
    other: Path, path: Path, weights: str, cases: list[tuple[str, int]], *, tokens: int, pairs: int, threads: int
) -> list[dict]:
    """Tokens per second of both checkouts in each case, which is (kind, rows).

    Returns: a dictionary per case with ``pairs``, [other, this] tokens per second, and the median of their ratios.
    """
    from bench import timing

    results = []
    sides = [_Checkout(tree, path, weights, threads) for tree in (other, ROOT)]
    for kind, rows in cases:
        for side in sides:
            side.ask(kind, rows, 4)  # warm-up
        found = []
        for index in range(pairs):
            order = (0, 1) if index % 2 == 0 else (1, 0)
            speeds = {which: sides[which].ask(kind, rows, tokens) for which in order}
            found.append([speeds[0], speeds[1]])
        median = timing.median([this / that for that, this in found])
        results.append({"weights": weights, "kind": kind, "rows": rows, "median": median, "pairs": found})
        print(f"{weights} {kind}, {rows} rows: {median:.3f} ×", flush=True)
    for side in sides:
        side.close()
    return results


def _work(path: str, weights: str, threads: int) -> None:
    """The worker: answers [kind, rows, tokens] with tokens per second of one row."""
    import torch
    from transformers import AutoModelForImageTextToText

    import qvl_kernels
    import qvl_model

    warnings.simplefilter("ignore")  # past_key_values is deprecated in 5.24, and has no other name in 5.17
    torch.set_num_threads(threads)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16, trust_remote_code=False).eval()
    model = qvl_model.accelerate(model, weights=None if weights == "bf16" else weights)

    def prompt(rows: int, length: int) -> dict:
        ids = torch.randint(10, 100, (rows, length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def generate(rows: int, tokens: int) -> float:
        options = dict(prompt(rows, PROMPT), do_sample=False, eos_token_id=None, pad_token_id=0)
        start = time.perf_counter()
        model.generate(**options, max_new_tokens=1)
        middle = time.perf_counter()
        model.generate(**options, max_new_tokens=1 + tokens)
        return tokens / (time.perf_counter() - middle - (middle - start))

    @torch.no_grad()
    def loop(rows: int, tokens: int) -> float:
        model.model.rope_deltas = None  # stock takes those of the last call that had another number of rows
        out = model(**prompt(rows, PROMPT), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return tokens / (time.perf_counter() - start)

    @torch.no_grad()
    def read(rows: int, tokens: int) -> float:
        model.model.rope_deltas = None
        batch = prompt(rows, tokens)
        start = time.perf_counter()
        model(**batch, use_cache=True, logits_to_keep=1)
        return batch["input_ids"].shape[1] / (time.perf_counter() - start)

    print(json.dumps(qvl_kernels.__file__), flush=True)
    for line in sys.stdin:
        kind, rows, tokens = json.loads(line)
        print(json.dumps({"generate": generate, "loop": loop, "prompt": read}[kind](rows, tokens)), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, metavar="OTHER", help="folder of the other checkout")
    parser.add_argument("--weights", nargs="+", choices=("bf16", "int8", "int4"), default=["bf16", "int8", "int4"])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate, or of a prompt (default 24)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs a case (default 7)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file of the pairs; rows of other cases in it are kept")
    arguments = parser.parse_args(argv)

    from bench import machine
    from bench.checkpoint import random_checkpoint
    from bench.families import FAMILIES

    path = random_checkpoint(FAMILIES["qwen3-vl"])
    cases = [(kind, rows) for kind in arguments.kind for rows in arguments.rows]
    before = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=arguments.other, capture_output=True, text=True, check=True
    ).stdout.strip()
    for weights in arguments.weights:
        rows = measure(
            arguments.other,
            path,
            weights,
            cases,
            tokens=arguments.tokens,
            pairs=arguments.pairs,
            threads=arguments.threads,
        )
        if arguments.output:
            _merge(arguments.output, {"machine": machine.describe(), "other": before, "rows": rows})
    return 0


def _merge(file: Path, result: dict) -> None:
    kept = json.loads(file.read_text())["rows"] if file.is_file() else []
    new = {(row["weights"], row["kind"], row["rows"]) for row in result["rows"]}
    result["rows"] = [row for row in kept if (row["weights"], row["kind"], row["rows"]) not in new] + result["rows"]
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        sys.exit(main())
