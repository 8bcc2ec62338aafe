"""The default calibration set: texts and drawn images as inputs of a model, and how a set is recorded."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PreTrainedModel

from qvl_model.images import load_image
from qvl_model.processing import load_processor
from qvl_model.quantization.calibration import Inputs
from qvl_model.quantization.calibration_texts import QUESTIONS, TEXTS

__all__ = ["DEFAULT", "images", "inputs_of", "put", "read", "recorded", "remember"]

DEFAULT = "default"
WINDOW = 2048  # tokens of a call with text
_RECORD = "_qvl_calibration"  # attribute of calibrated models


def images() -> list[Image.Image]:
    """One image per question, of several sizes, with smooth areas, edges, thin lines and noise; the same each time."""
    random = np.random.default_rng(0)
    drawn = []
    for number, (width, height) in enumerate(((256, 192), (192, 256), (320, 160), (224, 224))):
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        waves = [np.sin(x / (9 + 7 * number) + c) * np.cos(y / (23 - 4 * number) - c) for c in range(3)]
        pixels = 128 + 90 * np.stack(waves, -1) + random.normal(0, 6 + 6 * number, (height, width, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            left, top = int(random.integers(width)), int(random.integers(height))
            right, bottom = left + int(random.integers(8, 70)), top + int(random.integers(8, 70))
            red, green, blue = (int(value) for value in random.integers(0, 256, 3))
            shape = (draw.rectangle, draw.ellipse, draw.line)[int(random.integers(3))]
            shape([left, top, right, bottom], fill=(red, green, blue))
        for row in range(4):  # strokes, as lines of print have them
            for stroke in range(width // 8):
                if random.random() < 0.8:
                    begin = height - 40 + 9 * row
                    draw.line([8 * stroke, begin, 8 * stroke + int(random.integers(1, 7)), begin + 6], fill=0)
        drawn.append(image)
    return drawn


def inputs_of(model: PreTrainedModel) -> Inputs:
    """The default set as inputs of a model, made by the processor of its checkpoint.

    Raises: ValueError for a part of a model, and a model whose checkpoint or its processor is not known.
    """
    if not hasattr(model, "lm_head"):
        raise ValueError(
            f'accelerate: calibration="default" is for whole models, and {type(model).__name__} is a part; give inputs'
        )
    try:
        processor = load_processor(model.name_or_path)
        problem = "no chat template" if processor.chat_template is None else None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = str(error)
    if problem is not None:
        raise ValueError(
            f'accelerate: calibration="default" needs the processor of the checkpoint, which cannot be loaded from '
            f"{model.name_or_path!r} ({problem}); give inputs"
        )
    text = processor(text=["\n\n".join(TEXTS)], return_tensors="pt")
    config = model.config.get_text_config()
    length = min(WINDOW, config.max_position_embeddings)
    windows = [slice(begin, begin + length) for begin in range(0, text["input_ids"].shape[1], length)]
    found = [{name: value[:, window] for name, value in text.items()} for window in windows]
    drawn = images()
    at_once = getattr(config, "max_num_images", len(drawn))  # a call reads all weights, so few calls
    for begin in range(0, len(drawn), at_once):
        some = slice(begin, begin + at_once)
        found.append(_question(processor, drawn[some], " ".join(QUESTIONS[some])))
    return [{name: value.to(model.device) for name, value in inputs.items()} for inputs in found]


def read(file: Path, checkpoint: Path) -> Inputs:
    """Inputs from a JSONL file, by the processor of a checkpoint.

    Args:
        file: one {"text": ...}, or {"image": path or list of paths, "question": text}, per line; paths are relative to
            the file.
    Raises: ValueError for a line that is neither, with its number, and a file without lines; OSError for no file.
    """
    processor, found = load_processor(checkpoint), []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "text" in row:
                found.append(processor(text=[str(row["text"])], return_tensors="pt"))
                continue
            paths = row["image"] if isinstance(row["image"], list) else [row["image"]]
            opened = [load_image(path, file.parent) for path in paths]
            found.append(_question(processor, opened, str(row["question"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"calibration: {file}, line {number} is neither text nor image and question: {error!r}"
            ) from error
    if not found:
        raise ValueError(f"calibration: {file} holds no inputs")
    return found


def _question(processor: Any, shown: list[Image.Image], question: str) -> Mapping[str, Tensor]:
    content = [*({"type": "image"} for _ in shown), {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(images=shown, text=[prompt], return_tensors="pt")


def remember(model: PreTrainedModel, name: str, inputs: Inputs) -> None:
    """Notes on the model what it was calibrated with; saved files have it too."""
    digest = hashlib.sha256()
    for one in inputs:
        for key in sorted(one):
            digest.update(key.encode())
            value = one[key]
            digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    put(model, {"set": name, "sha256": digest.hexdigest()})


def _bytes(value: Tensor) -> bytes:
    value = value.detach().cpu().contiguous()
    return repr((value.dtype, tuple(value.shape))).encode() + value.flatten().view(torch.uint8).numpy().tobytes()


def put(model: PreTrainedModel, record: Mapping[str, str] | None) -> None:
    """Sets the record of a model; None forgets it."""
    model.__dict__.pop(_RECORD, None)
    if record is not None:
        model.__dict__[_RECORD] = dict(record)


def recorded(model: PreTrainedModel) -> dict[str, str] | None:
    """{"set": "default" or "own", "sha256": of the inputs} of a calibrated model, or None."""
    return model.__dict__.get(_RECORD)
