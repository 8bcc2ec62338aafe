"""Which input scales a model's quantised layers take, from its activations on calibration inputs.

The scales of a fold are s = (mean |x|)^a (rms w)^-b of each channel, centred, with the (a, b) of ``POWERS`` that has
the least output error: of the quantised layers on rounded activations, against the dense ones, on a sample of tokens
and rows. [activation-aware scales, b = 0: arXiv:2306.00978, section 3.2; b = 1 - a: arXiv:2211.10438, section 4]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from qvl_kernels import quantization
from qvl_kernels.memory import pages
from qvl_model.quantization import scaling

__all__ = ["Inputs", "calibrate", "check_inputs"]

Inputs = Sequence[Mapping[str, Any]]  # keyword arguments of the model, one mapping per call

# With b = 1 - a, a channel times f whose weights are divided by f has the same result as before.
POWERS = [(0.0, 0.0), *((a, 0.0) for a in (0.25, 0.5, 0.75, 1.0)), *((a, 1 - a) for a in (0.0, 0.25, 0.5, 0.75))]
LARGEST = 256.0  # of a scale, and of its reciprocal
TOKENS, ROWS = 128, 256  # sampled per fold, and per layer, for the choice of powers


def check_inputs(inputs: object) -> Inputs:
    """``inputs`` as a list of keyword arguments of the model; a mapping alone is a list of one.

    Raises: TypeError for anything else; ValueError for an empty list.
    """
    found = [inputs] if isinstance(inputs, Mapping) else inputs
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(isinstance(x, Mapping) for x in found):
        raise TypeError(
            f'accelerate: calibration takes None, "default", or a list of inputs of the model as its processor returns '
            f"them, got {inputs if isinstance(inputs, str) else type(inputs).__name__!r}"
        )
    if not found:
        raise ValueError("accelerate: calibration holds no inputs")
    return found


class _Activations:
    """Mean magnitude of each input of a layer, and a sample of its rows, the same in every run."""

    def __init__(self, inputs: int, calls: int) -> None:
        self.total, self.count = torch.zeros(inputs, dtype=torch.float64), 0
        self.sample: list[Tensor] = []
        self.per_call = -(-TOKENS // calls)

    def add(self, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        if not len(x):
            return
        self.total += x.abs().sum(0, dtype=torch.float32).double().cpu()
        self.count += len(x)
        step = max(1, len(x) // self.per_call)
        self.sample.append(x[step // 2 :: step][: self.per_call].clone().cpu())  # not a view that keeps x alive


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    formats: Mapping[str, tuple[int, int]],
    inputs: Inputs,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Input scales, fp32 [K], of layers that are better with them, and the relative squared error of the outputs of
    each layer that the inputs reach but the head's; the model stays as it is.

    Args:
        model: with dense weights.
        modules: its modules by name.
        formats: (bits, group) by the name of each layer that will be quantised.
        inputs: as ``check_inputs`` returns them.
    Raises: ValueError if no layer can be calibrated, or activations are not finite; what the model raises for inputs
        that do not fit it.
    """
    folds = [
        fold
        for fold in scaling.folds_of(modules)
        if all(name in formats for name in fold.readers)
        and (fold.source in formats or not isinstance(modules[fold.source], nn.Linear))
    ]
    if not folds:
        raise ValueError("accelerate: calibration found no dense layers that it could scale; restore the model first")
    scaled = {name for fold in folds for name in fold.readers}
    others = [name for name in formats if name not in scaled and name != "lm_head"]
    units = folds + [scaling.Fold("", (name,), torch.arange(modules[name].in_features)) for name in others]
    found: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    with tqdm(total=len(inputs) + len(units), desc="calibrating", disable=None) as bar:
        activations = _run(model, modules, units, inputs, bar)
        for unit, seen in zip(units, activations):
            if seen.count:
                scales, added = _best(unit, seen, modules, formats)
                errors |= added
                if scales is not None:
                    found |= dict.fromkeys(unit.readers, scales)
            seen.sample.clear()
            bar.update()
    return found, errors


def _run(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], folds: list[scaling.Fold], inputs: Inputs, bar: tqdm
) -> list[_Activations]:
    """Activations of all folds. Weights that are mapped from a file are dropped from memory after each use."""
    readers = [modules[fold.readers[0]] for fold in folds]
    activations = [_Activations(reader.in_features, len(inputs)) for reader in readers]
    handles = [
        reader.register_forward_pre_hook(lambda _, args, seen=seen: seen.add(args[0]))
        for reader, seen in zip(readers, activations)
    ]
    handles += [
        module.register_forward_hook(lambda module, *_: pages.release(module._parameters["weight"]))
        for module in modules.values()
        if isinstance(module, nn.Linear) and "weight" in module._parameters
    ]
    inner = getattr(model, "model", None)
    deltas = getattr(inner, "rope_deltas", None)  # positions of the last images, which a next text would take
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for kwargs in inputs:
            more = {"logits_to_keep": 1} if hasattr(model, "lm_head") else {}
            model(**{**kwargs, **more})
            bar.update()
    finally:
        for module, training in modes:
            module.training = training
        if inner is not None and hasattr(inner, "rope_deltas"):
            inner.rope_deltas = deltas
        for handle in handles:
            handle.remove()
    for fold, seen in zip(folds, activations):
        if not bool(seen.total.isfinite().all()):
            raise ValueError(
                f"accelerate: calibration found inputs of {fold.readers[0]} that are not finite; nothing was quantised"
            )
    return activations


def _best(
    unit: scaling.Fold,
    seen: _Activations,
    modules: Mapping[str, nn.Module],
    formats: Mapping[str, tuple[int, int]],
) -> tuple[Tensor | None, dict[str, float]]:
    """The scales [K] of the readers, None if none are better, and the errors of the readers with them."""
    x = torch.cat(seen.sample).float()
    weights = [modules[name].weight.detach() for name in unit.readers]
    rows = [weight[:: max(1, len(weight) // ROWS)][:ROWS].float().cpu() for weight in weights]
    for weight in weights:
        pages.release(weight)
    exact = [x @ weight.T for weight in rows]
    best, least = None, dict.fromkeys(unit.readers, torch.inf)
    magnitudes = _per_channel(seen.total, unit.index), _per_channel(torch.cat(rows).square().mean(0), unit.index).sqrt()
    for powers in POWERS if unit.source else POWERS[:1]:
        scales = None
        if any(powers):
            scales = _scales(magnitudes, powers, modules[unit.source])[unit.index]
        errors = {
            name: _error(x, weight, y, scales, *formats[name]) for name, weight, y in zip(unit.readers, rows, exact)
        }
        if sum(errors.values()) < sum(least.values()):
            best, least = scales, errors
    return best, least


def _per_channel(inputs: Tensor, index: Tensor) -> Tensor:
    """Sums, fp64 [C], over the inputs [K] that each channel is."""
    return torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, inputs.double())


def _scales(magnitudes: tuple[Tensor, Tensor], powers: tuple[float, float], source: nn.Module) -> Tensor:
    """Scales [C] from the magnitudes of activations and weights of each channel."""
    logs = [(one + 1e-4 * one.mean() + 1e-30).log() for one in magnitudes]
    log = powers[0] * logs[0] - powers[1] * logs[1]
    scales = (log - log.mean()).exp().clamp(1 / LARGEST, LARGEST).float()
    return scaling.representable(source, scales)


def _error(x: Tensor, weight: Tensor, exact: Tensor, scales: Tensor | None, bits: int, group: int) -> float:
    """Relative squared error of the outputs of the quantised rows ``weight`` on rounded activations."""
    if scales is not None:
        x, weight = x / scales, weight * scales
    quantized = quantization.quantize(weight, bits, group, zero_points=bits == 4)
    error = quantization.rounded_activations(x, quantized) @ quantization.dequantize(quantized).T - exact
    return (error.square().sum() / exact.square().sum().clamp_min(1e-30)).item()
