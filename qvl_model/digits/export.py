"""Writes digits scenes as training data of ``qvl train``: ``python -m qvl_model.digits.export DIRECTORY
[--rows N]``.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from qvl_model.digits import scenes

__all__ = ["main", "write_rows"]


def write_rows(file: Path, split: str, count: int, seed: int = 0) -> Path:
    """Writes ``count`` questions of ``split`` ("train" or "held_out") to a JSONL file and their images beside it."""
    images = file.parent / file.stem
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with open(file, "w") as stream:
        for i in range(count):
            question = scenes.make_question(split, rng)
            question.image.save(images / f"{i}.png")
            row = {"image": f"{file.stem}/{i}.png", "question": question.question, "answer": question.answer}
            stream.write(json.dumps(row) + "\n")
    return file


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=2000, help="training rows; a tenth of it is written for validation")
    args = parser.parse_args(argv)
    print(write_rows(args.directory / "train.jsonl", "train", args.rows))
    print(write_rows(args.directory / "validation.jsonl", "held_out", max(1, args.rows // 10), seed=1))


if __name__ == "__main__":
    main()
