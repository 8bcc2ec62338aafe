"""Checkpoints that other tools quantised, read into qvl's formats.

``quant_method``, the tensors of a layer, and what they become (N outputs, K inputs, groups of g inputs):

fp8                 as Qwen publishes them: weight e4m3 [N, K], weight_scale_inv [N / 128, K / 128]; dense, or int8
awq                 AutoAWQ, GEMM: qweight int32 [K, N / 8], qzeros int32 [K / g, N / 8], scales fp16 [K / g, N]; int4
gptq                qweight int32 [K / 8, N], qzeros int32 [K / g, N / 8], scales fp16 [K / g, N], g_idx [K]; int4
compressed-tensors  pack-quantized: weight_packed int32 [N, K / 8], weight_scale [N, K / g], weight_shape,
                    weight_zero_point int32 [N / 8, K / g], weight_g_idx [K]; int4

int4 weights keep their integers, zero-points and scales. An int32 holds eight values, the first in its lowest bits;
those of AWQ are in the order 0, 2, 4, 6, 1, 3, 5, 7. GPTQ stores zero-points less 1, unless ``checkpoint_format`` is
"gptq_v2"; compressed-tensors stores signed values plus 8.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qvl_kernels import quantization
from qvl_kernels.quantization import QuantizedWeight
from qvl_model.checkpoint_files import read_mapping
from qvl_model.modules.fast_path import FAST_DTYPES
from qvl_model.quantization.modules import FORMATS

__all__ = ["ADVICE", "METHODS", "read"]

ADVICE = "get another copy of it, or the dense checkpoint that it was made from"

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the value in each place of an int32
Get = Callable[[str], Tensor | None]  # a tensor of a layer by the end of its name


class _Method(NamedTuple):
    """How one tool stores a layer."""

    main: str  # the tensor that every quantised layer has
    others: tuple[str, ...]
    why_not: Callable[[Mapping], str | None]  # why its settings cannot be loaded
    weight: Callable[[Get, Mapping], Any]  # a QuantizedWeight, or the dense weight in fp32


def read(
    path: Path, section: Mapping, *, weights: str | None, dtype: torch.dtype | None, tied: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a checkpoint under the names that qvl's layers give them, and the other names of shared ones, as
    ``checkpoint.read`` returns them. Dense tensors are mapped from their files.

    Args:
        weights: format of the layers that are fp8 in the file: "int8", or None, dense. They are converted one by one.
        dtype: of those that become dense; None for that of the first dense tensor.
        tied: whether the head shares the embedding's weight.
    Raises: ValueError for settings, tensors or files that cannot be loaded.
    """
    method = METHODS[section["quant_method"]]
    reason = method.why_not(section)
    if reason is not None:
        raise ValueError(f"{path} cannot be loaded: {reason}")
    tensors: dict[str, Tensor] = {}
    with _stored(path) as stored:
        layers = {name.removesuffix(f".{method.main}") for name in stored if name.endswith(f".{method.main}")}
        layers = {name for name in layers if method.main != "weight" or f"{name}.weight_scale_inv" in stored}
        taken = {f"{layer}.{end}" for layer in layers for end in (method.main, *method.others)}
        for name, load in stored.items():
            if name not in taken:
                tensors[name] = load()
                if tensors[name].dtype not in FAST_DTYPES:
                    raise ValueError(
                        f"{path}: {name} is {tensors[name].dtype}, which no tensor that belongs to it explains"
                    )
        dtype = dtype or next((tensor.dtype for tensor in tensors.values()), torch.float32)
        for layer in sorted(layers):
            try:
                weight = method.weight(_getter(stored, layer), section)
                if isinstance(weight, Tensor) and weights is not None:
                    weight = quantization.quantize(weight, FORMATS[weights])
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{path}: {layer} does not fit its quantization_config: {error}") from error
            if isinstance(weight, QuantizedWeight):
                for end, tensor in zip(("values", "scales", "zeros"), weight.tensors):
                    tensors[f"{layer}.weight_{end}"] = tensor
            else:
                tensors[f"{layer}.weight"] = weight.to(dtype)
    head, embedding = "lm_head.weight", "model.language_model.embed_tokens.weight"
    if tied and (head not in tensors or embedding in tensors and torch.equal(tensors[head], tensors[embedding])):
        tensors.pop(head, None)
        return tensors, {head: embedding}
    return tensors, {}


@contextmanager
def _stored(path: Path) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """Functions that load the tensors of all weight files of a directory, by name."""
    index = path / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        mapping = read_mapping(index).get("weight_map")
        if not isinstance(mapping, dict):
            raise ValueError(f"{index} has no weight_map; {ADVICE}")
        names = {str(name) for name in mapping.values()}
    files = [path / name for name in sorted(names)]
    try:
        with ExitStack() as open_files:
            found: dict[str, Callable[[], Tensor]] = {}
            for file in files:
                if file.parent != path or not file.is_file():
                    raise ValueError(f"{path} has no file {file.name}")
                stream = open_files.enter_context(safe_open(file, "pt"))
                found |= {name: lambda s=stream, n=name: s.get_tensor(n) for name in stream.keys()}
            yield found
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are damaged ({error})") from error


def _getter(stored: Mapping[str, Callable[[], Tensor]], layer: str) -> Get:
    def get(end: str) -> Tensor | None:
        load = stored.get(f"{layer}.{end}")
        return None if load is None else load()

    return get


def _needed(get: Get, end: str) -> Tensor:
    tensor = get(end)
    if tensor is None:
        raise ValueError(f"its {end} is missing")
    return tensor


def _unpacked(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Values in [0, 15] as uint8 [..., 8 * words] of int32 [..., words]."""
    if words.dtype != torch.int32:
        raise ValueError(f"its values must be packed in int32, got {words.dtype}")
    shifts = torch.tensor([4 * order.index(place) for place in range(8)], dtype=torch.int32)
    return (words[..., None] >> shifts & 15).to(torch.uint8).flatten(-2)


def _int4(values: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor | None) -> QuantizedWeight:
    """Values [N, K], scales and zero-points [N, groups]; ``groups``: the group of each input, int [K]."""
    size = values.shape[1] // max(1, scales.shape[1])
    if groups is not None and not torch.equal(groups.long(), torch.arange(values.shape[1]) // size):
        raise ValueError("its inputs are not in the order of their groups (act-order), which qvl does not run")
    if zeros is not None and bool((zeros == quantization.ZERO).all()):
        zeros = None
    return quantization.from_integers(values, scales.contiguous(), zeros)


def _awq(get: Get, section: Mapping) -> QuantizedWeight:
    values = _unpacked(_needed(get, "qweight"), AWQ_ORDER).T
    return _int4(values, _needed(get, "scales").T, _unpacked(_needed(get, "qzeros"), AWQ_ORDER).T, None)


def _gptq(get: Get, section: Mapping) -> QuantizedWeight:
    values = _unpacked(_needed(get, "qweight").T)
    zeros = _unpacked(_needed(get, "qzeros")).T + (section.get("checkpoint_format") != "gptq_v2")
    if bool((zeros > 15).any()):
        raise ValueError("it has the zero-point 16, which int4 cannot hold")
    groups = get("g_idx")
    if section.get("desc_act") and groups is None:
        raise ValueError("its g_idx is missing")
    return _int4(values, _needed(get, "scales").T, zeros, groups)


def _compressed_tensors(get: Get, section: Mapping) -> QuantizedWeight:
    values, scales, zeros = _unpacked(_needed(get, "weight_packed")), _needed(get, "weight_scale"), None
    rows, size = (int(number) for number in _needed(get, "weight_shape"))
    if values.shape != (rows, -(-size // 8) * 8):
        raise ValueError(f"its weight_packed does not hold {rows} x {size} values")
    stored = get("weight_zero_point")
    if stored is not None and stored.dtype == torch.int8:  # as older versions store them
        zeros = (stored + 8).to(torch.uint8)
    elif stored is not None:
        zeros = _unpacked(stored.T).T
        if zeros.shape[0] != -(-rows // 8) * 8:
            raise ValueError(f"its weight_zero_point does not hold {rows} rows")
        zeros = zeros[:rows]
    elif not all(group["weights"].get("symmetric", True) for group in section["config_groups"].values()):
        raise ValueError("its weight_zero_point is missing")
    return _int4(values[:, :size], scales, zeros, get("weight_g_idx"))


def _fp8(get: Get, section: Mapping) -> Tensor:
    weight, scales = _needed(get, "weight"), _needed(get, "weight_scale_inv")
    if weight.dtype != torch.float8_e4m3fn or weight.dim() != 2:
        raise ValueError(f"its weight must be float8_e4m3fn [N, K], got {weight.dtype} {list(weight.shape)}")
    if scales.dtype not in (*FAST_DTYPES, torch.float8_e8m0fnu):
        raise ValueError(f"its weight_scale_inv must be fp32, bf16, fp16 or float8_e8m0fnu, got {scales.dtype}")
    rows, columns = section["weight_block_size"]
    blocks = [-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)]
    if list(scales.shape) != blocks:
        raise ValueError(f"its weight_scale_inv must be {blocks}, got {list(scales.shape)}")
    wide = scales.float().repeat_interleave(columns, 1)[:, : weight.shape[1]]
    out = weight.float()
    for block in range(blocks[0]):
        out[block * rows : (block + 1) * rows] *= wide[block]
    return out


def _group_reason(bits: Any, group: Any) -> str | None:
    if bits != 4:
        return f"its weights have {bits} bits; qvl loads 4"
    if group not in quantization.GROUPS:
        return f"its groups have {group} inputs; qvl runs {', '.join(map(str, quantization.GROUPS))}"
    return None


def _awq_reason(section: Mapping) -> str | None:
    version = str(section.get("version", "gemm")).lower()
    if version != "gemm":
        return f"its layout is AWQ's {version}; qvl loads gemm"
    if not section.get("zero_point", True):
        return "it has no zero-points; qvl loads AWQ weights with zero_point"
    return _group_reason(
        section.get("bits", section.get("w_bit")), section.get("group_size", section.get("q_group_size"))
    )


def _gptq_reason(section: Mapping) -> str | None:
    layout = section.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        return f"its layout is GPTQ's {layout}; qvl loads gptq and gptq_v2"
    return _group_reason(section.get("bits"), section.get("group_size"))


def _compressed_tensors_reason(section: Mapping) -> str | None:
    if section.get("format") != "pack-quantized":
        return f"its format is {section.get('format')}; of compressed-tensors qvl loads pack-quantized"
    for name in ("transform_config", "kv_cache_scheme"):
        if section.get(name):
            return f"it has a {name}, which qvl does not run"
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "it has no config_groups"
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            return f"{name} says nothing about weights"
        weights = group["weights"]
        if weights.get("type") != "int":
            return f"{name} has weights of type {weights.get('type')}; qvl loads int"
        if group.get("input_activations") or group.get("output_activations"):
            return f"{name} quantises activations too; qvl loads quantised weights"
        reason = _group_reason(weights.get("num_bits"), weights.get("group_size"))
        if reason is not None:
            return reason
    return None


def _fp8_reason(section: Mapping) -> str | None:
    if section.get("activation_scheme", "dynamic") != "dynamic":
        return f"its activations have {section['activation_scheme']} scales; qvl loads fp8 weights with dynamic ones"
    block = section.get("weight_block_size")
    if not (
        isinstance(block, list | tuple)
        and len(block) == 2
        and all(isinstance(size, int) and size > 0 for size in block)
    ):
        return f"its weight_block_size is {block}; qvl loads fp8 weights in blocks, such as [128, 128]"
    return None


METHODS = {
    "fp8": _Method("weight", ("weight_scale_inv",), _fp8_reason, _fp8),
    "awq": _Method("qweight", ("qzeros", "scales"), _awq_reason, _awq),
    "gptq": _Method("qweight", ("qzeros", "scales", "g_idx"), _gptq_reason, _gptq),
    "compressed-tensors": _Method(
        "weight_packed",
        ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        _compressed_tensors_reason,
        _compressed_tensors,
    ),
}
