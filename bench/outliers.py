"""Quantised trained models with outlier channels, with and without calibration: ``python -m bench.outliers``

Outliers are put into the trained models that ship, as large trained models have them, without changing what the models
compute (``inject``). Each weight format is measured without outliers, with them, and with them after calibration on
other images and questions than those that are asked: by the KL divergence from the dense model and by exact answers to
held-out questions. ``--write`` keeps the figures in bench/results/outliers.json, from which the docs take them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.divergence import Divergence, Estimate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LABELS", "Answers", "Found", "inject", "lost", "main", "run"]

RESULTS = Path(__file__).resolve().parent / "results" / "outliers.json"
QUESTIONS = 256
FACTORS = (32.0, 64.0)  # powers of two: exact in every dtype
SHARE = 0.02  # of the channels
LABELS = ("without outliers", "with outliers", "calibrated", "calibrated on the default set")


@torch.no_grad()
def inject(model: nn.Module, seed: int = 0) -> nn.Module:
    """Multiplies a few channels that linear layers read by 32 or 64, and divides their columns by it, in place: after
    norms, values and up projections of a Qwen3-VL or QVL model. The function is exactly the same.
    """
    random = torch.Generator().manual_seed(seed)

    def factors(channels: int) -> Tensor:
        chosen = torch.randperm(channels, generator=random)[: max(1, round(SHARE * channels))]
        found = torch.ones(channels)
        found[chosen] = torch.tensor(FACTORS)[torch.randint(2, (len(chosen),), generator=random)]
        return found

    def multiply(source: nn.Module, rows: slice, factor: Tensor) -> None:
        for tensor in (source.weight, source.bias if hasattr(source, "bias") else None):
            if tensor is not None:
                tensor[rows].mul_(factor.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1)))

    def divide(reader: nn.Linear, factor: Tensor) -> None:
        reader.weight.div_(factor.to(reader.weight.dtype))

    def after_norm(norm: nn.Module, *readers: nn.Linear, tiles: int = 1) -> None:
        factor = factors(norm.weight.numel())
        multiply(norm, slice(None), factor)
        for reader in readers:
            divide(reader, factor.repeat(tiles))

    def after_rows(source: nn.Linear, reader: nn.Linear, begin: int = 0, head: int = 1, repeats: int = 1) -> None:
        factor = factors(source.out_features - begin)
        multiply(source, slice(begin, None), factor)
        divide(reader, factor.view(-1, 1, head).expand(-1, repeats, -1).flatten())

    def attention(module: nn.Module) -> None:
        after_rows(module.v_proj, module.o_proj, head=module.head_dim, repeats=module.num_key_value_groups)

    for layer in model.model.language_model.layers:
        attention(layer.self_attn)
        after_norm(layer.input_layernorm, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        after_norm(layer.post_attention_layernorm, layer.mlp.gate_proj, layer.mlp.up_proj)
        after_rows(layer.mlp.up_proj, layer.mlp.down_proj)
        if getattr(layer, "fusion", None) is not None:
            attention(layer.fusion.attn)
            after_norm(layer.fusion.norm, layer.fusion.attn.q_proj)
    for block in model.model.visual.blocks:
        after_rows(block.attn.qkv, block.attn.proj, begin=2 * block.attn.proj.in_features)
        after_norm(block.norm1, block.attn.qkv)
        after_norm(block.norm2, block.mlp.linear_fc1)
    visual = model.model.visual
    for merger in (visual.merger, *visual.deepstack_merger_list) if hasattr(visual, "merger") else ():
        after_norm(merger.norm, merger.linear_fc1, tiles=merger.linear_fc1.in_features // merger.norm.weight.numel())
    if hasattr(visual, "norm"):
        connector = model.model.connector
        layers = getattr(connector, "layers", ())
        readers = [one for layer in layers for one in (layer.attn.k_proj, layer.attn.v_proj)]
        after_norm(visual.norm, *(readers or [connector.mlp.fc1]))
        for layer in layers:
            after_norm(layer.norm1, layer.attn.q_proj)
            after_rows(layer.attn.v_proj, layer.attn.o_proj)
            after_norm(layer.norm2, layer.mlp.fc1)
    return model


class Found(NamedTuple):
    """What one model answered."""

    kl: Estimate  # mean KL divergence from the dense model, nats per token
    exact: list[bool]  # for each question, whether all tokens of its answer are the most likely


class Answers:
    """Logits of the answers to held-out questions, of the dense model and of others beside it."""

    def __init__(self, name: str, questions: int = QUESTIONS) -> None:
        from bench import accuracy
        from qvl_model import digits
        from qvl_model.digits import scenes
        from qvl_model.processing import load_processor

        self.name, self.processor = name, load_processor(digits.SHIPPED[name])
        items = [accuracy.Item([q.image], q.question, q.answer) for q in scenes.held_out_questions(questions)]
        self._batches = list(accuracy._batches(self.processor, items, with_answers=True))
        self._dense = self._logits(self.stock())
        self.exact = [_right(logits, targets) for logits, targets in self._dense]

    def stock(self) -> "PreTrainedModel":
        """The trained model in bf16."""
        from transformers import AutoModelForImageTextToText

        from qvl_model import digits

        return AutoModelForImageTextToText.from_pretrained(
            digits.SHIPPED[self.name], dtype=torch.bfloat16, trust_remote_code=False
        ).eval()

    def measure(self, model: nn.Module) -> Found:
        """Of a model that computes what the trained one does."""
        divergence, exact = Divergence(), []
        for (expected, targets), (logits, _) in zip(self._dense, self._logits(model), strict=True):
            divergence.add(expected, logits, targets)
            exact.append(_right(logits, targets))
        return Found(divergence.estimates()["kl_mean"], exact)

    def training_questions(self, count: int = 16) -> list[Any]:
        """Inputs to calibrate on: none of their digits is in a held-out question."""
        import numpy as np

        from qvl_model.digits import scenes

        found, random = [], np.random.default_rng(5)
        for question in (scenes.make_question("train", random) for _ in range(count)):
            content = [{"type": "image"}, {"type": "text", "text": question.question}]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            found.append(self.processor(images=[question.image], text=[prompt + question.answer], return_tensors="pt"))
        return found

    @torch.inference_mode()
    def _logits(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Logits and targets of the answer to each question."""
        found = []
        for _, inputs, lengths in self._batches:
            logits = model(**inputs).logits
            for row, length in enumerate(lengths.tolist()):
                found.append((logits[row, -length - 1 : -1], inputs["input_ids"][row, -length:]))
        return found


def _right(logits: Tensor, targets: Tensor) -> bool:
    return bool((logits.argmax(-1) == targets).all())


def lost(before: Sequence[bool], after: Sequence[bool]) -> float:
    """How much smaller the share of right answers is, less two standard errors of the difference."""
    changes = [int(a) - int(b) for a, b in zip(before, after, strict=True)]
    mean = sum(changes) / len(changes)
    return mean - 2 * (sum((change - mean) ** 2 for change in changes) ** 0.5 / len(changes))


def run(answers: Answers, weights: str) -> dict[str, Found]:
    """One entry per label, of one weight format.

    Example:
        >>> run(Answers("digits"), "int8")["calibrated"].kl
    """
    import qvl_model

    def found(outliers: bool, **options: Any) -> Found:
        model = inject(answers.stock()) if outliers else answers.stock()
        return answers.measure(qvl_model.accelerate(model, weights=weights, **options))

    cases = (
        found(False),
        found(True),
        found(True, calibration=answers.training_questions()),
        found(True, calibration="default"),
    )
    return dict(zip(LABELS, cases, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results/outliers.json")
    arguments = parser.parse_args(argv)
    from qvl_model import digits

    rows = []
    for name in digits.SHIPPED:
        answers = Answers(name)
        for weights in ("int8", "int4"):
            for label, found in run(answers, weights).items():
                exact, dense = (sum(right) / len(right) for right in (found.exact, answers.exact))
                print(f"{name} {weights} {label}: KL {found.kl}, exact {exact:.2%} (dense {dense:.2%})", flush=True)
                rows.append([name, weights, label, found.kl.value, found.kl.error, exact, dense])
    if arguments.write:
        RESULTS.write_text(json.dumps({"questions": QUESTIONS, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
