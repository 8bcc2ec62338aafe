"""Reinforcement learning with TRL's GRPOTrainer: python examples/grpo_trl.py [OUT] [STEPS]

Four answers are sampled to each question, and right ones rewarded. Needs TRL: pip install trl scikit-learn.
"""

import sys
from typing import Any

import numpy as np
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from qvl_model import Qwen3VLForConditionalGeneration, digits
from qvl_model.digits import scenes
from qvl_model.processing import load_processor


def rows(count: int) -> Dataset:
    """Prompts as TRL takes them, and the right answer for the reward."""
    rng = np.random.default_rng(0)
    questions = [scenes.make_question("train", rng) for _ in range(count)]
    return Dataset.from_list(
        [{"image": q.image, "prompt": [{"role": "user", "content": q.question}], "answer": q.answer} for q in questions]
    )


def is_right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The reward: 1 for the exact answer."""
    return [float(found[0]["content"].strip() == right) for found, right in zip(completions, answer)]


def main(out: str = "digits-grpo", steps: str = "10") -> list[float]:
    """Writes the trained model to ``out`` and returns the mean reward of each step."""
    path = digits.checkpoint("digits")
    trainer = GRPOTrainer(
        model=Qwen3VLForConditionalGeneration.from_pretrained(path),  # accelerated already
        reward_funcs=is_right,
        args=GRPOConfig(
            out,
            max_steps=int(steps),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=12,
            learning_rate=1e-6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=rows(2 * int(steps)),
        processing_class=load_processor(path),
    )
    trainer.train()
    trainer.save_model(out)
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:])
