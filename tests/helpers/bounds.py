"""Error bounds against the fp64 reference, from lengths and unit roundoffs alone: the same on every processor.

Kernels sum in fp32, in any order.
"""

import math

import torch

SINGLE = torch.finfo(torch.float32).eps
EXP2_SHORT = 3e-6  # relative error of vec_exp2_short in csrc/cpu/kernels/math.inl.h


def norm_error(dtype: torch.dtype, terms: int, *, exponent: float = 0.0, roundings: int = 2) -> float:
    """Bound of ||out - expected|| / ||expected|| for sums of ``terms`` products, with that many roundings to ``dtype``:
    by default an operand and the result.

    Rounding errors have random signs, so those of a sum grow as the root of its length [Higham and Mary 2019].
    ``exponent``: the largest argument of exp, whose error in units of its own size becomes one of the result.
    """
    return roundings / 2 * torch.finfo(dtype).eps + SINGLE * (8 + math.sqrt(terms) + exponent)


def matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x weight^T + bias in fp64, and the error bound of each element: each rounding adds at most its unit roundoff
    times the sum of absolute values.
    """
    x, weight, bias = x.double(), weight.double(), torch.zeros(()) if bias is None else bias.double()
    y = x @ weight.t() + bias
    terms = x.abs() @ weight.abs().t() + bias.abs()
    return y, torch.finfo(dtype).eps * y.abs() + (8 + x.shape[-1] / 8) * SINGLE * terms + torch.finfo(dtype).tiny


def largest_scores(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Upper bound of the scores of each query and head [..., T, H, 1], by Cauchy-Schwarz over keys [..., S, Hkv, D];
    NaN in masked keys is ignored.
    """
    longest = k.double().nan_to_num(0.0).norm(dim=-1).max() if k.numel() else 0.0
    return abs(q.shape[-1] ** -0.5 if scale is None else scale) * q.double().norm(dim=-1, keepdim=True) * longest


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    golden: torch.Tensor,
    magnitude: torch.Tensor,
    dtype: torch.dtype,
    *,
    scale: float | None,
    added: torch.Tensor | float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Error bounds of out [..., T, H, D], and of scores and lse [..., T, H, 1]: absolute errors of scores become
    relative errors of probabilities. ``magnitude``: the same attention over |v|; ``added``: the largest additive mask
    value of a visible key.
    """
    head_dim, keys, largest = q.shape[-1], k.shape[-3], largest_scores(q, k, scale)
    scores = (8 + head_dim / 8) * SINGLE * largest + 2 * SINGLE * added
    probabilities = 2 * scores + 16 * SINGLE * (1 + 2 * largest + added) + (8 + keys / 8) * SINGLE
    exponentials = 0.0
    if dtype is torch.bfloat16:  # the bf16 dot instruction takes probabilities in bf16, and their sum is of short ones
        probabilities = probabilities + torch.finfo(dtype).eps
        exponentials = EXP2_SHORT
    slack = torch.finfo(dtype).eps * golden.abs() + probabilities * magnitude + torch.finfo(dtype).tiny
    return slack, scores + (16 + keys / 8) * SINGLE + exponentials


def assert_within(what: str, out: torch.Tensor, golden: torch.Tensor, slack: torch.Tensor | float) -> None:
    """Every element of ``out`` equals ``golden`` (infinities and NaN included) or differs by at most ``slack``."""
    assert out.shape == golden.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(golden.shape)}"
    wide = out.double()
    good = (wide == golden) | ((wide - golden).abs() <= slack) | (wide.isnan() & golden.isnan())
    if not bool(good.all()):
        first = tuple((~good).nonzero()[0].tolist())
        allowed = slack if isinstance(slack, float) else slack.expand(golden.shape)[first].item()
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {good.numel()} elements are wrong, the first at {first}: got "
            f"{wide[first].item()}, "
            f"golden {golden[first].item()}, allowed {allowed:.3e}"
        )
