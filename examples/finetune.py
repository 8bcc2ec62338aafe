"""Fine-tunes the digits model with transformers' Trainer: python examples/finetune.py [OUT] [STEPS]

Needs the extra "train": pip install ".[train]". For a real model name its directory in ``digits.checkpoint``, and give
rows of your own; `qvl train` does the same from a YAML file.
"""

import sys
from pathlib import Path

from transformers import TrainingArguments

from qvl_model import Qwen3VLForConditionalGeneration, digits, training
from qvl_model.digits.export import write_rows
from qvl_model.processing import load_processor


def main(out: str = "digits-tuned", steps: str = "20") -> list[float]:
    """Writes the trained model to ``out`` and returns the losses."""
    path = digits.checkpoint("digits")
    rows_file = write_rows(Path(out) / "train.jsonl", "train", 8 * int(steps))  # images and questions, as JSONL

    processor = load_processor(path)
    rows = training.Rows(training.JsonlRows(rows_file), training.Encoder(processor, max_length=512))
    print(rows.skipped)
    trainer = training.Trainer(
        model=Qwen3VLForConditionalGeneration.from_pretrained(path),  # accelerated already
        args=TrainingArguments(
            out,
            max_steps=int(steps),
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=training.Collator(processor),
        callbacks=[training.CapacityCallback(every=10)],
    )
    trainer.train()
    trainer.save_model(out)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:])
