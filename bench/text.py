"""Perplexity of a plain text per precision, and the divergence from the dense model. Each window is one sequence."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.divergence import Divergence, Estimate, text_logits, windows

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["PRECISIONS", "TextResult", "load", "run", "with_weights"]

# Row of the table -> arguments of accelerate; the dense model that all are compared with is stock's.
PRECISIONS: dict[str, dict] = {
    "accelerated": {},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "int8, calibrated": {"weights": "int8", "calibration": "default"},
    "int4, calibrated": {"weights": "int4", "calibration": "default"},
}
_COLUMNS = ("perplexity", "perplexity_ratio", "kl_mean", "kl_p99", "top1_agreement")


@dataclass
class TextResult:
    """Estimates by precision; ``str`` is a Markdown table with standard errors."""

    model: str
    text: str
    sequences: int
    tokens: int
    precisions: dict[str, dict[str, Estimate]]

    def __str__(self) -> str:
        dense = next(iter(self.precisions.values()))["perplexity_dense"]
        lines = [
            f"{self.model} on {self.text}: {self.tokens} tokens in {self.sequences} sequences; dense: {dense}",
            f"| weights | {' | '.join(name.replace('_', ' ') for name in _COLUMNS)} |",
            "| --- " * (len(_COLUMNS) + 1) + "|",
        ]
        lines += [
            f"| {name} | {' | '.join(str(found[column]) for column in _COLUMNS)} |"
            for name, found in self.precisions.items()
        ]
        return "\n".join(lines)


def run(model: Path, text: str, window: int = 512, limit: int | None = None) -> TextResult:
    """Compares every precision with the stock model, all in the checkpoint's dtype. The stock logits of all sequences
    are kept: tokens times the vocabulary, in that dtype.

    Args:
        model: directory of a checkpoint: Qwen3-VL, QVL, or a language model of transformers.
        text: file of plain text.
        window: tokens per sequence.
        limit: use that many sequences only.
    Raises: ValueError for a text with fewer than two tokens, and other numbers; OSError for files that are not there.
    """
    from transformers import AutoTokenizer

    from qvl_model.replacements import MODEL_CLASSES

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    ids = tokenizer(Path(text).read_text(), add_special_tokens=False, verbose=False).input_ids
    sequences = windows(ids, window)[:limit]
    if not sequences:
        raise ValueError(f"{text} holds {len(ids)} tokens; at least 2 are needed")
    stock = load(model)
    dense, takes_calibration = [text_logits(stock, one) for one in sequences], isinstance(stock, MODEL_CLASSES)
    del stock
    precisions = {}
    for name, options in PRECISIONS.items():
        if "calibration" in options and not takes_calibration:
            continue
        ours, divergence = with_weights(load(model), **options), Divergence()
        for sequence, expected in zip(sequences, dense):
            divergence.add(expected, text_logits(ours, sequence), sequence[0, 1:])
        precisions[name] = divergence.estimates()
    return TextResult(str(model), str(text), len(sequences), sum(map(len, dense)), precisions)


def load(path: Path) -> "PreTrainedModel":
    """The stock model of a checkpoint, in its dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    import qvl_model.qvl  # noqa: F401  (registers QVL)

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    kind = AutoModelForImageTextToText if type(config) in AutoModelForImageTextToText._model_mapping else None
    return (
        (kind or AutoModelForCausalLM)
        .from_pretrained(path, dtype="auto", attn_implementation="sdpa", trust_remote_code=False)
        .eval()
    )


def with_weights(model: "PreTrainedModel", **options: str) -> "nn.Module":
    """The accelerated model; of a model that ``accelerate`` does not take, the linear layers but the head are
    quantised. Calibration is for those that it takes.
    """
    import qvl_model
    from qvl_model.quantization.modules import PackedLinear
    from qvl_model.replacements import MODEL_CLASSES

    if isinstance(model, MODEL_CLASSES):
        return qvl_model.accelerate(model, **options)
    head = model.get_output_embeddings()
    for module in list(model.modules()) if "weights" in options else []:
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child is not head:
                setattr(module, name, PackedLinear.from_linear(child, options["weights"]))
    return model
