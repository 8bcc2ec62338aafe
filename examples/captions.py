"""Captions for a folder of images, in batches: python examples/captions.py FOLDER [MODEL]

`qvl batch FOLDER --prompt ... --out FILE.jsonl` does this too, and goes on where it was stopped.
"""

import sys
from pathlib import Path

import torch

from qvl_model import Qwen3VLForConditionalGeneration, digits
from qvl_model.images import load_image
from qvl_model.processing import load_processor

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main(
    folder: str, model_name: str = "digits", prompt: str = "Read the digits from left to right.", batch: int = 4
) -> dict[str, str]:
    """Prints the caption of each image, and returns them by name."""
    path = digits.checkpoint(model_name)
    model = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype="auto")
    processor = load_processor(path)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    files = sorted(file for file in Path(folder).iterdir() if file.suffix.lower() in SUFFIXES)
    captions = {}
    for begin in range(0, len(files), batch):
        some = files[begin : begin + batch]
        inputs = processor(
            images=[load_image(file) for file in some],
            text=[text] * len(some),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for file, answer in zip(some, answers, strict=True):
            print(f"{file.name}: {answer}")
            captions[file.name] = answer
    return captions


if __name__ == "__main__":
    main(*sys.argv[1:])
