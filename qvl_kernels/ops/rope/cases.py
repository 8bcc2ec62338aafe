"""Cases of qk_norm_rope and vision_rope: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES", "VISION_CASES"]


def _tables(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> dict:
    angles = torch.rand(*shape[:-1], shape[-1] // 2, generator=generator) * 100
    angles = torch.cat((angles, angles), -1)
    return {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}


def _case(
    name: str, b: int, t: int, h: int, hkv: int, d: int, *, tables: int = 1, strided: bool = False, model: bool = False
) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        if strided:  # slices of a fused qkv projection
            qkv = random_tensor((b, t, (h + hkv) * d + 3), dtype, generator)
            q, k = qkv[..., 1 : 1 + h * d].view(b, t, h, d), qkv[..., 1 + h * d : 1 + (h + hkv) * d].view(b, t, hkv, d)
        else:
            q, k = random_tensor((b, t, h, d), dtype, generator), random_tensor((b, t, hkv, d), dtype, generator)
        return {
            "q": q,
            "k": k,
            "q_weight": random_tensor((d,), dtype, generator),
            "k_weight": random_tensor((d,), dtype, generator),
            **_tables((tables, t, d), dtype, generator),
        }

    elements = b * t * (h + hkv) * d
    return Case(name, make, flops=10.0 * elements, bytes=lambda size: 2.0 * elements * size, model=model)


def _vision_case(name: str, n: int, h: int, d: int, *, strided: bool = False, model: bool = False) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        if strided:
            qkv = random_tensor((n, 3, h, d), dtype, generator)
            q, k = qkv[:, 0], qkv[:, 1]
        else:
            q, k = random_tensor((n, h, d), dtype, generator), random_tensor((n, h, d), dtype, generator)
        return {"q": q, "k": k, **_tables((n, d), torch.float32, generator)}

    return Case(name, make, flops=12.0 * n * h * d, bytes=lambda size: 4.0 * n * h * d * size, model=model)


CASES = [
    _case("decode", 1, 1, 16, 8, 128, model=True),
    _case("prefill", 1, 262, 16, 8, 128, model=True),
    _case("batch_tables", 3, 5, 4, 2, 16, tables=3),
    _case("odd_half", 2, 7, 6, 3, 18),
    _case("strided", 2, 4, 4, 2, 24, strided=True),
    _case("smallest", 1, 1, 1, 1, 2),
    _case("empty", 1, 0, 4, 2, 16),
]
VISION_CASES = [
    _vision_case("image_448", 784, 16, 64, model=True),
    _vision_case("odd", 9, 3, 20),
    _vision_case("strided", 33, 4, 36, strided=True),
    _vision_case("empty", 0, 4, 16),
]
