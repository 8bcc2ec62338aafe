"""Trains a digits model and writes a complete checkpoint: ``python -m qvl_model.digits.train --out DIR [--family
qvl]``.

Either family at small width, on the same scenes in the same order, by transformers.Trainer in about ten minutes on two
cores.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from qvl_model.digits import scenes
from qvl_model.digits.families import FAMILIES, Family
from qvl_model.training.encode import IGNORED, pad

__all__ = ["build_tokenizer", "chat_ids", "main"]

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' or 'video' in part %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the questions and answers, with Qwen's special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        *scenes.QUESTIONS.values(),
        "system",
        "user\n",
        "assistant\n",
        *(f"{a} {b} {c}" for a, b, c in np.ndindex(10, 10, 10)),
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )


def chat_ids(
    tokenizer: PreTrainedTokenizerFast, question: str, answer: str, places: int
) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of one exchange; ``places``: image tokens."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * places)
    return tokenizer(prompt).input_ids, tokenizer(answer + "<|im_end|>").input_ids


class _Scenes(Dataset):
    """``size`` training questions, each a function of (seed, index): no scene repeats, and all runs have the same."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        question = scenes.make_question("train", np.random.default_rng((self.seed, index)))
        return {"image": np.asarray(question.image), "question": question.question, "answer": question.answer}


class _Collator:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, family: Family) -> None:
        self.tokenizer, self.family = tokenizer, family
        self.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        parts = []
        for row in rows:
            prompt, answer = chat_ids(self.tokenizer, row["question"], row["answer"], self.family.places)
            ids = torch.tensor(prompt + answer)
            seen = self.family.image(row["image"], ids == self.image_token_id)
            parts.append({"input_ids": ids, "labels": torch.tensor([IGNORED] * len(prompt) + answer), **seen})
        return pad(parts, self.tokenizer.pad_token_id)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3-vl")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    family = FAMILIES[args.family]
    model = family.model(family.config({token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    log = args.out.with_name(args.out.name + ".trainer")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(log),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=200,
            weight_decay=0.05,
            max_grad_norm=1.0,
            adam_beta2=0.98,
            logging_steps=100,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            use_cpu=True,
            seed=args.seed,
            dataloader_num_workers=0,
        ),
        train_dataset=_Scenes(args.steps * args.batch, args.seed),
        data_collator=_Collator(tokenizer, family),
    )
    trainer.train()
    model.generation_config.update(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=16
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    family.image_processor().save_pretrained(args.out)
    shutil.rmtree(log, ignore_errors=True)


if __name__ == "__main__":
    main()
