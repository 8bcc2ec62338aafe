"""Scenes of one to three scanned digits, and questions about them.

The digits are the 8 x 8 scans that ship with scikit-learn (UCI Optical Recognition of Handwritten Digits). Training and
held-out scenes never share a source scan.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

__all__ = ["CELL", "HEIGHT", "QUESTIONS", "Question", "WIDTH", "held_out_questions", "make_question", "source_digits"]

CELL, HEIGHT, WIDTH = 32, 32, 96  # three cells side by side, one merged visual token each
HELD_OUT_SHARE = 0.2
QUESTIONS = {
    "which": "Which digit is this?",
    "count": "How many digits are there?",
    "larger": "Which digit is larger?",
    "read": "Read the digits from left to right.",
}


@dataclass(frozen=True)
class Question:
    """An image (PIL, RGB, 96 x 32), a question about it and the exact answer."""

    image: Image.Image
    kind: str
    question: str
    answer: str


@cache
def source_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(scans [N, 8, 8] uint8 0..16, labels [N]) of the "train" or "held_out" split, by a fixed shuffle of
    the sources.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits scenes need scikit-learn: pip install scikit-learn") from error
    if split not in ("train", "held_out"):
        raise ValueError(f'split must be "train" or "held_out", got {split!r}')
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    held_out = int(len(order) * HELD_OUT_SHARE)
    chosen = order[:held_out] if split == "held_out" else order[held_out:]
    return digits.images[chosen].astype(np.uint8), digits.target[chosen]


def _draw_digit(scan: np.ndarray, rng: np.random.Generator, augment: bool) -> Image.Image:
    """The scan as a 32 x 32 grey cell: 22 to 30 pixels high, shifted; turned and stretched a little when augmenting."""
    digit = Image.fromarray((scan.astype(np.float32) * (255 / 16)).astype(np.uint8))
    if augment:
        size = (int(rng.integers(20, 31)), int(rng.integers(22, 32)))
    else:
        size = (int(rng.integers(23, 28)), int(rng.integers(24, 30)))
    digit = digit.resize(size, Image.Resampling.BICUBIC)
    if augment:
        digit = digit.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR)
    cell = Image.new("L", (CELL, CELL))
    cell.paste(digit, (int(rng.integers(0, CELL - size[0] + 1)), int(rng.integers(0, CELL - size[1] + 1))))
    return cell


def _draw_scene(scans: list[np.ndarray], rng: np.random.Generator, augment: bool) -> Image.Image:
    """Digits in distinct cells from left to right; ink and paper of random brightness, light noise."""
    ink = np.zeros((HEIGHT, WIDTH), np.float32)
    for cell, scan in zip(sorted(rng.choice(3, len(scans), replace=False)), scans):
        ink[:, cell * CELL : (cell + 1) * CELL] = np.asarray(_draw_digit(scan, rng, augment), np.float32) / 255
    paper, black = rng.uniform(0, 50, 3), rng.uniform(190, 255, 3)
    pixels = paper + ink[:, :, None] * (black - paper) + rng.normal(0, 4, (HEIGHT, WIDTH, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_question(split: str, rng: np.random.Generator) -> Question:
    """A random scene of ``split`` and a question about it; training scenes are augmented."""
    scans, labels = source_digits(split)
    kind = str(rng.choice(list(QUESTIONS)))
    count = {"which": 1, "larger": 2}.get(kind) or int(rng.integers(1, 4))
    chosen = rng.integers(0, len(labels), count)
    while kind == "larger" and labels[chosen[0]] == labels[chosen[1]]:
        chosen = rng.integers(0, len(labels), count)
    values = [int(label) for label in labels[chosen]]
    answer = {
        "which": str(values[0]),
        "count": str(count),
        "larger": str(max(values)),
        "read": " ".join(map(str, values)),
    }[kind]
    image = _draw_scene([scans[i] for i in chosen], rng, augment=split == "train")
    return Question(image, kind, QUESTIONS[kind], answer)


def held_out_questions(count: int = 2000, seed: int = 1) -> list[Question]:
    """The same ``count`` held-out questions for the same seed."""
    rng = np.random.default_rng(seed)
    return [make_question("held_out", rng) for _ in range(count)]
