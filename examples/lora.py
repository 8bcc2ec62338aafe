"""Trains a LoRA adapter over int8 weights with PEFT and transformers' Trainer: python examples/lora.py [OUT] [STEPS]

Needs the extra "train" and PEFT: pip install ".[train]" peft. The int8 weights stay as they are; only the adapter, in
fp32, is trained and saved.
"""

import sys
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

import qvl_model
from qvl_model import Qwen3VLForConditionalGeneration, digits, training
from qvl_model.digits.export import write_rows
from qvl_model.processing import load_processor


def base(path: Path) -> Qwen3VLForConditionalGeneration:
    """The model that is adapted, its weights quantised in memory."""
    return qvl_model.accelerate(Qwen3VLForConditionalGeneration.from_pretrained(path), weights="int8")


def main(out: str = "digits-lora", steps: str = "20") -> tuple[list[float], PeftModel]:
    """Writes the adapter to ``out``; returns the losses and the model with the adapter loaded again."""
    path = digits.checkpoint("digits")
    processor = load_processor(path)
    rows_file = write_rows(Path(out) / "train.jsonl", "train", 8 * int(steps))
    rows = training.Rows(training.JsonlRows(rows_file), training.Encoder(processor, max_length=512))

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = get_peft_model(base(path), config)
    model.print_trainable_parameters()
    trainer = training.Trainer(
        model=model,
        args=TrainingArguments(
            out,
            max_steps=int(steps),
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=training.Collator(processor),
    )
    trainer.train()
    model.save_pretrained(out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, PeftModel.from_pretrained(base(path), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
