"""Answers a question about an image on the CPU: python examples/generate.py [MODEL] [IMAGE] [QUESTION]

Without arguments it asks the small model that ships, which reads digits. MODEL is a directory or a name on the hub,
such as Qwen/Qwen3-VL-2B-Instruct.
"""

import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from qvl_model import Qwen3VLForConditionalGeneration, digits
from qvl_model.images import load_image
from qvl_model.processing import load_processor


def main(
    model_name: str = "digits", image: str = str(digits.SAMPLE), question: str = "Read the digits from left to right."
) -> str:
    """Prints the answer, and returns it."""
    path = digits.checkpoint(model_name)
    if not Path(path).is_dir():
        path = snapshot_download(model_name)
    model = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype="auto")
    processor = load_processor(path)

    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(images=[load_image(image)], text=[prompt], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
    answer = processor.batch_decode(tokens, skip_special_tokens=True)[0]
    print(answer)
    return answer


if __name__ == "__main__":
    main(*sys.argv[1:])
