"""Quantises a checkpoint to int8, saves it and loads it again: python examples/int8.py [MODEL_DIRECTORY] [OUT]

Loading maps the int8 weights: bf16 weights are never made.
"""

import sys
from pathlib import Path

import qvl_model
from qvl_model import Qwen3VLForConditionalGeneration, digits


def main(model_name: str = "digits", out: str = "qwen3-vl-int8") -> Qwen3VLForConditionalGeneration:
    """Writes ``out`` and returns the model that was loaded from it."""
    path = digits.checkpoint(model_name)
    model = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype="auto")
    model = qvl_model.accelerate(model, weights="int8")  # or "int4", or {"text": "int4", "vision": "int8"}
    model.save_pretrained(out)

    before, after = (sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) for folder in (path, out))
    print(f"{out}: {after / 1e6:.1f} MB of weights, from {before / 1e6:.1f} MB")
    return Qwen3VLForConditionalGeneration.from_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
