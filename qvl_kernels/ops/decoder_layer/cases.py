"""Cases of decoder_layer: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.ops.decoder_layer.call import DecoderWeights
from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES"]


def _case(
    name: str,
    b: int,
    t: int,
    past: int,
    c: int,
    h: int,
    hkv: int,
    d: int,
    f: int,
    *,
    mask: str | None = None,
    bias: bool = False,
    model: bool = False,
) -> Case:
    capacity = past + t + 5

    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        def w(n: int, k: int) -> torch.Tensor:
            return random_tensor((n, k), dtype, generator, scale=k**-0.5)

        def norm(n: int) -> torch.Tensor:
            return 1.0 + 0.1 * random_tensor((n,), dtype, generator)

        weights = DecoderWeights(
            norm(c),
            w(h * d, c),
            w(hkv * d, c),
            w(hkv * d, c),
            norm(d),
            norm(d),
            w(c, h * d),
            norm(c),
            w(f, c),
            w(f, c),
            w(c, f),
            *((random_tensor((n,), dtype, generator) for n in (h * d, hkv * d, hkv * d, c)) if bias else ()),
        )
        angles = torch.rand(1, t, d // 2, generator=generator) * 100
        angles = torch.cat((angles, angles), -1)
        arguments = {
            "x": random_tensor((b, t, c), dtype, generator),
            "weights": weights,
            "cos": angles.cos().to(dtype),
            "sin": angles.sin().to(dtype),
            "k_cache": random_tensor((b, hkv, capacity, d), dtype, generator),
            "v_cache": random_tensor((b, hkv, capacity, d), dtype, generator),
            "past": past,
            "num_heads": h,
        }
        if mask is not None:
            keys = past + t + 2
            visible = torch.ones(t, keys, dtype=torch.bool).tril(past).repeat(b, 1, 1, 1)
            for sample in range(b):  # left padding
                visible[sample, :, :, :sample] = False
            arguments["mask"] = (
                visible if mask == "bool" else torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -1e4)
            )
        return arguments

    parameters = c * (h + 2 * hkv) * d + h * d * c + 3 * c * f
    attention_flops = 4.0 * b * t * (past + t) * h * d
    return Case(
        name,
        make,
        flops=2.0 * b * t * parameters + attention_flops,
        bytes=lambda size: float(parameters + 2 * b * hkv * d * (past + t) + 2 * b * t * c) * size,
        model=model,
    )


CASES = [
    _case("decode", 1, 1, 300, 2048, 16, 8, 128, 6144, model=True),
    _case("prefill", 1, 262, 0, 2048, 16, 8, 128, 6144, model=True),
    _case("odd_decode", 2, 1, 7, 72, 6, 3, 24, 100),
    _case("odd_prefill", 3, 9, 0, 72, 6, 3, 24, 100),
    _case("panels", 1, 150, 3, 64, 4, 2, 16, 130),
    _case("bool_mask", 3, 6, 4, 64, 4, 2, 16, 96, mask="bool"),
    _case("additive_mask", 2, 5, 0, 64, 4, 2, 16, 96, mask="additive"),
    _case("whole_tiles", 2, 20, 0, 64, 2, 1, 32, 96),
    _case("bias", 1, 3, 2, 40, 2, 1, 20, 56, bias=True),
]
