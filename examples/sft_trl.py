"""Supervised fine-tuning with TRL's SFTTrainer on images and answers: python examples/sft_trl.py [OUT] [STEPS]

Needs TRL: pip install trl scikit-learn. For a real model name its directory, and give rows of your own.
"""

import sys

import numpy as np
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from qvl_model import Qwen3VLForConditionalGeneration, digits
from qvl_model.digits import scenes
from qvl_model.processing import load_processor


def rows(count: int) -> Dataset:
    """Conversations as TRL takes them: prompt, completion and images."""
    rng = np.random.default_rng(0)
    questions = [scenes.make_question("train", rng) for _ in range(count)]
    return Dataset.from_list(
        [
            {
                "images": [question.image],
                "prompt": [{"role": "user", "content": question.question}],
                "completion": [{"role": "assistant", "content": question.answer}],
            }
            for question in questions
        ]
    )


def main(out: str = "digits-sft", steps: str = "20") -> list[float]:
    """Writes the trained model to ``out`` and returns the losses."""
    path = digits.checkpoint("digits")
    trainer = SFTTrainer(
        model=Qwen3VLForConditionalGeneration.from_pretrained(path),  # accelerated already
        args=SFTConfig(
            out,
            max_steps=int(steps),
            per_device_train_batch_size=4,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=None,  # cutting a sequence could cut an image
        ),
        train_dataset=rows(4 * int(steps)),
        processing_class=load_processor(path),
    )
    trainer.train()
    trainer.save_model(out)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:])
