"""Cases of attention: shapes of the model and awkward ones, for tests and benchmarks."""

import torch

from qvl_kernels.testing import Case, random_tensor

__all__ = ["CASES"]


def _case(
    name: str,
    b: int,
    t: int,
    s: int,
    h: int,
    hkv: int,
    d: int,
    *,
    causal: bool = False,
    model: bool = False,
    lengths: list[int] | None = None,
    layout: str = "bthd",
    mask: str | None = None,
    padding: bool = False,
    scale: float = 1.0,
) -> Case:
    def tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        if layout == "bhtd":  # a transposed view, as in a KV cache
            b_, t_, h_, d_ = shape
            return random_tensor((b_, h_, t_ + 3, d_), dtype, generator, scale=scale)[:, :, 1 : 1 + t_].transpose(1, 2)
        return random_tensor(shape, dtype, generator, scale=scale)

    def make(dtype: torch.dtype, generator: torch.Generator) -> dict:
        if lengths is not None:
            n = sum(lengths)
            bounds = torch.tensor([0, *lengths]).cumsum(0).int()
            return {
                "q": random_tensor((n, h, d), dtype, generator),
                "k": random_tensor((n, hkv, d), dtype, generator),
                "v": random_tensor((n, hkv, d), dtype, generator),
                "cu_seqlens": bounds,
                "causal": causal,
            }
        arguments = {
            "q": tensor((b, t, h, d), dtype, generator),
            "k": tensor((b, s, hkv, d), dtype, generator),
            "v": tensor((b, s, hkv, d), dtype, generator),
            "causal": causal,
        }
        if mask == "bool":
            arguments["mask"] = torch.rand(b, 1, t, s, generator=generator) > 0.3
        elif mask == "additive":
            arguments["mask"] = random_tensor((1, h, t, s), dtype, generator)
        if padding:
            counts = torch.randint(0, s + 1, (b,), generator=generator)
            arguments["key_padding_mask"] = torch.arange(s)[None] >= counts[:, None]  # left padding
        return arguments

    pairs = sum(length**2 for length in lengths) if lengths is not None else b * t * s
    tokens = sum(lengths) if lengths is not None else b * t
    keys = sum(lengths) if lengths is not None else b * s
    flops = 4.0 * pairs * h * d * (0.5 if causal and t == s else 1.0)
    return Case(
        name, make, flops=flops, bytes=lambda size: float(2 * tokens * h * d + 2 * keys * hkv * d) * size, model=model
    )


CASES = [
    _case("vision_448", 1, 784, 784, 16, 16, 64, lengths=[784], model=True),
    _case("text_prefill", 1, 262, 262, 16, 8, 128, causal=True, model=True),
    _case("causal_square", 2, 70, 70, 4, 2, 32, causal=True),
    _case("causal_longer_keys", 1, 5, 150, 6, 3, 24, causal=True),
    _case("causal_longer_queries", 1, 9, 4, 2, 1, 16, causal=True),
    _case("one_query", 3, 1, 301, 4, 2, 128),
    _case("odd_head_dim", 1, 33, 17, 3, 3, 15),
    _case("head_dim_72", 1, 20, 20, 2, 2, 72, layout="bhtd"),
    _case("head_dim_256", 1, 7, 40, 2, 1, 256),
    _case("varlen", 0, 0, 0, 4, 4, 20, lengths=[4, 0, 1, 67, 130]),
    _case("varlen_causal", 0, 0, 0, 4, 2, 16, lengths=[3, 200], causal=True),
    _case("whole_tiles", 2, 33, 50, 4, 2, 64, layout="bhtd"),
    _case("varlen_whole_tiles", 0, 0, 0, 4, 2, 32, lengths=[40, 0, 64, 3]),
    _case("bool_mask", 2, 30, 45, 4, 2, 16, mask="bool"),
    _case("additive_mask", 2, 30, 45, 4, 2, 16, mask="additive"),
    _case("left_padding", 3, 40, 40, 4, 2, 16, causal=True, padding=True),
    _case("large_scores", 1, 40, 40, 2, 2, 16, scale=8.0),
    _case("split_keys", 1, 1, 5000, 2, 1, 64, layout="bhtd"),
    _case("no_keys", 1, 3, 0, 2, 1, 16),
    _case("no_queries", 1, 0, 5, 2, 1, 16),
]
