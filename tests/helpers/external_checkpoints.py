"""Checkpoints in the layouts of other quantisation tools, written from a model or from random integers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["INT4", "integers", "layer", "section", "write"]

INT4 = ("awq", "gptq", "gptq_v2", "compressed-tensors", "symmetric")
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def integers(rows: int, size: int, group: int, *, symmetric: bool = False, seed: int = 0) -> tuple[Tensor, ...]:
    """Random values [N, K], scales [N, groups] and zero-points [N, groups] of an int4 weight."""
    generator = torch.Generator().manual_seed(seed)
    groups = size // group
    zeros = torch.randint(1, 16, (rows, groups), generator=generator)
    return (
        torch.randint(16, (rows, size), generator=generator),
        (torch.rand(rows, groups, generator=generator) * 0.02 + 1e-3).half(),
        torch.full_like(zeros, 8) if symmetric else zeros,
    )


def _packed(values: Tensor, places: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight values of the last dimension in an int32, value ``places[i]`` in bits 4 i to 4 i + 3."""
    words = torch.zeros(*values.shape[:-1], values.shape[-1] // 8, dtype=torch.int64)
    for bits, place in enumerate(places):
        words |= values[..., place::8].long() << 4 * bits
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def layer(method: str, values: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """The tensors that a tool stores for an int4 layer."""
    size, group = values.shape[1], values.shape[1] // scales.shape[1]
    if method == "awq":
        return {
            "qweight": _packed(values.T, AWQ_PLACES),
            "qzeros": _packed(zeros.T, AWQ_PLACES),
            "scales": scales.T.contiguous(),
        }
    if method in ("gptq", "gptq_v2"):
        return {
            "qweight": _packed(values).T.contiguous(),
            "qzeros": _packed((zeros - int(method == "gptq")).T),
            "scales": scales.T.contiguous(),
            "g_idx": (torch.arange(size) // group).int(),
        }
    stored = {
        "weight_packed": _packed(values),
        "weight_scale": scales,
        "weight_shape": torch.tensor(values.shape),
    }
    return stored if method == "symmetric" else stored | {"weight_zero_point": _packed(zeros.T).T.contiguous()}


def section(method: str, group: int = 32) -> dict:
    """The ``quantization_config`` that a tool writes."""
    if method == "fp8":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.visual"],
        }
    if method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    if method in ("gptq", "gptq_v2"):
        return {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "checkpoint_format": method}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights | {"symmetric": method == "symmetric"},
                "input_activations": None,
            }
        },
        "ignore": ["lm_head"],
    }


def _fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of an fp8 layer, and its weight in fp32."""
    rows, size = weight.shape
    blocks = nn.functional.pad(weight.float(), (0, -size % 128, 0, -rows % 128))
    blocks = blocks.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # [N / 128, 128, K / 128, 128]
    scales = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    exact = (values.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :size]
    values = values.flatten(2).flatten(0, 1)[:rows, :size].contiguous()
    return {"weight": values, "weight_scale_inv": scales}, exact


def write(model: nn.Module, path: Path, method: str, group: int = 32) -> None:
    """Writes a dense model with the linear layers of its decoder in another tool's layout. ``model`` then has the
    weights that were written.
    """
    model.save_pretrained(path)
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for index, (name, module) in enumerate(model.named_modules()):
        if not isinstance(module, nn.Linear) or ".layers." not in name:
            continue
        del tensors[f"{name}.weight"]
        if method == "fp8":
            stored, exact = _fp8(module.weight.detach())
        else:
            values, scales, zeros = integers(*module.weight.shape, group, symmetric=method == "symmetric", seed=index)
            stored = layer(method, values, scales, zeros)
            exact = (values - zeros.repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)
        tensors |= {f"{name}.{end}": tensor for end, tensor in stored.items()}
        with torch.no_grad():
            module.weight.copy_(exact)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": section(method, group)}))
