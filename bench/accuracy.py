"""Answer agreement with stock: ``python -m bench.accuracy [--model PATH --questions FILE.jsonl | --text FILE]``

Stock against accelerated on a trained checkpoint, for every weight format: exact answers (generated, greedy), mean
log-likelihood and perplexity of the reference answers, and agreement of the generated answers. Default: the models that
ship, one of each family, on the held-out questions of the digits scenes. FILE.jsonl has one ``{"image": path or list of
paths, "question": text, "answer": text}`` per line, paths relative to the file. With --text, the perplexity of a plain
text and the divergence from the dense model instead, for any checkpoint of a language model: ``bench.text``.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["PRECISIONS", "Item", "Precision", "load_questions", "main", "run"]

BATCH = 64


@dataclass(frozen=True)
class Precision:
    """Weights of the accelerated model, and what may change: stock has ``dtype`` too.

    Attributes:
        weights: of ``accelerate``; None leaves them in ``dtype``.
        agreement: the least answer agreement with stock; None where weights are quantised and answers near a tie may
            change.
        exact_loss: how much smaller the share of right answers may be.
        perplexity_ratio: at most.
    """

    dtype: torch.dtype
    weights: str | None = None
    agreement: float | None = 0.999
    exact_loss: float = 0.001
    perplexity_ratio: float = 1.001


PRECISIONS = {
    "bf16": Precision(torch.bfloat16),
    "fp32": Precision(torch.float32),
    "fp16": Precision(torch.float16),
    "int8": Precision(torch.bfloat16, "int8", agreement=None, exact_loss=0.003, perplexity_ratio=1.01),
    "int4": Precision(torch.bfloat16, "int4", agreement=None, exact_loss=0.01, perplexity_ratio=1.05),
}


@dataclass(frozen=True)
class Item:
    """One question about one or more PIL images, with its exact answer."""

    images: list
    question: str
    answer: str


def load_questions(file: Path) -> list[Item]:
    """Items of a JSONL file. Raises ValueError with the line number for a line that is not a question."""
    from qvl_model.images import load_image

    items = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            paths = row["image"] if isinstance(row["image"], list) else [row["image"]]
            images = [load_image(path, file.parent) for path in paths]
            items.append(Item(images, str(row["question"]), str(row["answer"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{file}, line {number}: {error!r}; expected {{"image", "question", "answer"}}') from error
    if not items:
        raise ValueError(f"{file} holds no questions")
    return items


def _digits_items(limit: int | None) -> list[Item]:
    from qvl_model.digits import scenes

    questions = scenes.held_out_questions(limit or 2000)
    return [Item([q.image], q.question, q.answer) for q in questions]


def _batches(
    processor: "ProcessorMixin", items: list[Item], with_answers: bool
) -> Iterator[tuple[list[Item], dict, torch.Tensor]]:
    """(items, model inputs, tokens of each answer); questions padded on the left, answers appended if asked for."""
    for begin in range(0, len(items), BATCH):
        part = items[begin : begin + BATCH]
        texts, answer_tokens = [], []
        for item in part:
            content = [{"type": "image"} for _ in item.images] + [{"type": "text", "text": item.question}]
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            answer = item.answer + processor.tokenizer.eos_token
            answer_tokens.append(len(processor.tokenizer(answer).input_ids))
            texts.append(prompt + answer if with_answers else prompt)
        images = [item.images for item in part]
        inputs = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
        yield part, dict(inputs), torch.tensor(answer_tokens)


def _evaluate(model: "PreTrainedModel", processor: "ProcessorMixin", items: list[Item]) -> dict:
    """{"answers": [...], "log_likelihood": summed, "tokens": counted} of a model on all items."""
    answers, total, tokens = [], 0.0, 0
    # Room for the longest reference answer and a few tokens more, so that a wrong longer answer counts as wrong.
    longest = max(len(processor.tokenizer(item.answer).input_ids) for item in items) + 8
    with torch.inference_mode():
        for _, inputs, _ in _batches(processor, items, with_answers=False):
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=longest)
            new = ids[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
        for _, inputs, lengths in _batches(processor, items, with_answers=True):
            keep = int(lengths.max()) + 1
            logits = model(**inputs, logits_to_keep=keep).logits.float().log_softmax(-1)
            targets = inputs["input_ids"][:, -keep + 1 :]
            likelihood = logits[:, :-1].gather(2, targets[..., None])[..., 0]
            counted = torch.arange(keep - 1)[None] >= keep - 1 - lengths[:, None]
            total += likelihood[counted].sum().item()
            tokens += int(counted.sum())
    return {"answers": answers, "log_likelihood": total, "tokens": tokens}


def run(model: str = "digits", questions: str | None = None, limit: int | None = None) -> dict:
    """Runs the suite on one model.

    Args:
        model: one that ships ("digits", "qvl-tiny"), or a checkpoint directory.
        questions: JSONL file; needed with a model that does not ship.
        limit: use that many questions only.
    Returns:
        {"model": str, "passed": bool, "questions": int, "precisions": {name: metrics}, "rows": rows of the benchmark's
        table}.
    """
    from transformers import AutoModelForImageTextToText

    import qvl_model
    from qvl_model import digits
    from qvl_model.processing import load_processor

    path = digits.checkpoint(model)
    if path not in digits.SHIPPED.values() and questions is None:
        raise ValueError("accuracy of another model needs its own questions: give --questions FILE.jsonl")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    items = load_questions(Path(questions))[:limit] if questions else _digits_items(limit)
    processor = load_processor(path)
    stock: dict[torch.dtype, dict] = {}
    precisions, rows = {}, []
    for name, precision in PRECISIONS.items():
        loaded = AutoModelForImageTextToText.from_pretrained(
            path, dtype=precision.dtype, attn_implementation="sdpa", trust_remote_code=False
        ).eval()
        if precision.dtype not in stock:
            stock[precision.dtype] = _evaluate(loaded, processor, items)
        ours = _evaluate(qvl_model.accelerate(loaded, weights=precision.weights), processor, items)
        metrics = _compare(stock[precision.dtype], ours, items)
        added = _rows(name, metrics, precision)
        metrics["passed"] = all(row[-1] != "miss" for row in added)
        precisions[name] = metrics
        rows += added
    passed = all(metrics["passed"] for metrics in precisions.values())
    return {"model": str(model), "passed": passed, "questions": len(items), "precisions": precisions, "rows": rows}


def _compare(stock: dict, ours: dict, items: list[Item]) -> dict:
    def exact(answers: list[str]) -> float:
        return sum(answer == item.answer for answer, item in zip(answers, items)) / len(items)

    agreement = sum(a == b for a, b in zip(stock["answers"], ours["answers"])) / len(items)
    mean_stock, mean_ours = (side["log_likelihood"] / side["tokens"] for side in (stock, ours))
    return {
        "exact_stock": exact(stock["answers"]),
        "exact_ours": exact(ours["answers"]),
        "agreement": agreement,
        "log_likelihood_stock": mean_stock,
        "log_likelihood_ours": mean_ours,
        "perplexity_stock": math.exp(-mean_stock),
        "perplexity_ours": math.exp(-mean_ours),
        "perplexity_ratio": math.exp(mean_stock - mean_ours),
    }


def _rows(name: str, m: dict, precision: Precision) -> list[list[str]]:
    """Label, stock, accelerated, ratio, range, target, verdict, as in the benchmark's table."""

    def verdict(met: bool) -> str:
        return "pass" if met else "miss"

    loss, agreement, ratio = precision.exact_loss, precision.agreement, precision.perplexity_ratio
    return [
        [
            f"answers exact, {name}",
            f"{m['exact_stock']:.2%}",
            f"{m['exact_ours']:.2%}",
            "",
            "",
            f"≥ stock − {100 * loss:g} points",
            verdict(m["exact_ours"] >= m["exact_stock"] - loss),
        ],
        [
            f"log-likelihood per token, {name}",
            f"{m['log_likelihood_stock']:.5f}",
            f"{m['log_likelihood_ours']:.5f}",
            "",
            "",
            "",
            "",
        ],
        [
            f"answer agreement with stock, {name}",
            "",
            "",
            f"{m['agreement']:.2%}",
            "",
            f"≥ {agreement:.1%}" if agreement else "",
            verdict(m["agreement"] >= agreement) if agreement else "",
        ],
        [
            f"perplexity, {name}",
            f"{m['perplexity_stock']:.5f}",
            f"{m['perplexity_ours']:.5f}",
            f"{m['perplexity_ratio']:.5f}×",
            "",
            f"≤ {ratio:g}×",
            verdict(m["perplexity_ratio"] <= ratio),
        ],
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint directory, or a model that ships (default: all that ship)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--questions", help="JSONL file of questions")
    source.add_argument("--text", metavar="FILE", help="plain text; prints perplexity, KL divergence, top-1 agreement")
    parser.add_argument("--window", type=int, default=512, help="tokens per sequence of --text (default: 512)")
    parser.add_argument("--limit", type=int, help="use the first N questions, or sequences of the text, only")
    arguments = parser.parse_args(argv)
    from qvl_model import digits

    try:
        if arguments.text is not None:
            from bench import text

            print(text.run(digits.checkpoint(arguments.model), arguments.text, arguments.window, arguments.limit))
            return 0
        results = [
            run(model, arguments.questions, arguments.limit)
            for model in ([arguments.model] if arguments.model else digits.SHIPPED)
        ]
    except (ValueError, OSError) as error:
        print(f"bench.accuracy: {error}", file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.table import Table

    for result in results:
        title = f"{result['model']}: accuracy on {result['questions']} questions"
        table = Table("", "stock", "accelerated", "ratio", "", "target", "", title=title)
        for row in result["rows"]:
            table.add_row(*row)
        Console().print(table)
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
