"""Embeddings of images and texts from hidden states: python examples/embeddings.py [MODEL] [IMAGE ...]

The mean over the hidden states of the last layer but one, of length 1: near images have a product near 1.
"""

import sys

import torch
from torch import Tensor

from qvl_model import Qwen3VLForConditionalGeneration, digits
from qvl_model.images import load_image
from qvl_model.processing import load_processor


def main(model_name: str = "digits", *images: str) -> Tensor:
    """Prints the products of all pairs of images, and returns the embeddings [images, hidden_size]."""
    path = digits.checkpoint(model_name)
    model = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype="auto").eval()
    processor = load_processor(path)
    content = [{"type": "image"}, {"type": "text", "text": "Describe this image."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    found = []
    for file in images or (str(digits.SAMPLE),) * 2:
        inputs = processor(images=[load_image(file)], text=[text], return_tensors="pt")
        with torch.inference_mode():
            hidden = model.model(**inputs, output_hidden_states=True).hidden_states[-2]
        found.append(torch.nn.functional.normalize(hidden[0].float().mean(0), dim=0))
    embeddings = torch.stack(found)
    print(embeddings @ embeddings.T)
    return embeddings


if __name__ == "__main__":
    main(*sys.argv[1:])
