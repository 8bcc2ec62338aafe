"""The numbers that the CPU kernels multiply where weights are quantised."""

import torch
from kernel_selection import TILE_ISAS

import qvl_kernels
from qvl_kernels import quantization

__all__ = ["as_multiplied", "requantized", "rounded_again"]

GEMV_ROWS, TILE_GROUP = 16, 128  # kQuantGemvMaxM and kTileQuantGroup in csrc/cpu/kernel_table.h


def as_multiplied(
    x: torch.Tensor, weight: quantization.QuantizedWeight, isa: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] and the weight [N, K] as the kernels of an instruction set, by default that in use, multiply them:
    with their roundings, in fp64. GEMMs of int4 on matrix units have their own: see ``requantized``.
    """
    tiles = (isa or qvl_kernels.cpu_info()["isa"]) in TILE_ISAS and weight.bits == 4
    if not tiles or x.numel() // max(1, x.shape[-1]) <= GEMV_ROWS:
        return quantization.rounded_activations(x, weight).double(), quantization.dequantize(weight).double()
    values, scales = quantization.quantize_activations(x, TILE_GROUP)
    x64 = values.double().unflatten(-1, (-1, TILE_GROUP)) * scales.double()[..., None]
    return x64.flatten(-2)[..., : x.shape[-1]], requantized(weight)


def rounded_again(arguments: dict) -> float:
    """Relative error that ``requantized`` and wider groups of activations add in a call of quantized_linear; else 0."""
    x, weight = arguments.get("x"), arguments.get("weight")
    tiles = qvl_kernels.cpu_info()["isa"] in TILE_ISAS and isinstance(weight, quantization.QuantizedWeight)
    return 0.012 if tiles and weight.bits == 4 and x.numel() // x.shape[-1] > GEMV_ROWS else 0.0


def requantized(weight: quantization.QuantizedWeight) -> torch.Tensor:
    """An int4 weight [N, K] as tiles multiply it, in fp64: rounded to int8 with one scale per row and group of
    activations, 1/127 of the largest value that a nibble could stand for there.
    """
    scales, zeros = weight.scales.float()[..., None], quantization._zero_points(weight)  # [N, groups, 1]
    padded = torch.nn.functional.pad(quantization.dequantize(weight), (0, -weight.in_features % weight.group))
    levels = torch.round(padded.unflatten(1, (-1, weight.group)) / scales)  # nibble - zero
    reach = (scales * torch.maximum(zeros + torch.zeros_like(scales), 15.0 - zeros + torch.zeros_like(scales))).abs()
    together = TILE_GROUP // weight.group
    reach = torch.nn.functional.pad(reach, (0, 0, 0, -reach.shape[1] % together)).unflatten(1, (-1, together))
    largest = reach.amax(2).repeat_interleave(together, 1)[:, : scales.shape[1]]
    values = torch.round(levels * (scales * (largest.new_tensor(127.0) / largest)))  # ties are rounded as in the kernel
    return (values.double() * (largest / 127.0).double()).flatten(1)[:, : weight.in_features]
