"""How far from the float64 truth a right result may be, from lengths and units of rounding alone: the same on every
processor.

Kernels sum in fp32, in any order.
"""

import math

import torch

SINGLE = torch.finfo(torch.float32).eps


def norm_error(dtype: torch.dtype, terms: int, *, exponent: float = 0.0, roundings: int = 2) -> float:
    """||out - truth|| / ||truth|| of sums of ``terms`` products, rounded to ``dtype`` as often as said: an operand and
    the result.

    Rounding errors have random signs, so those of a sum grow as the root of its length [Higham and Mary 2019].
    ``exponent``: the largest argument of exp, whose error in units of its own size becomes one of the result.
    """
    return roundings / 2 * torch.finfo(dtype).eps + SINGLE * (8 + math.sqrt(terms) + exponent)


def matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x weight^T + bias in float64, and how far each element may be off: each rounding by at most its unit of all that
    is summed.
    """
    x, weight, bias = x.double(), weight.double(), torch.zeros(()) if bias is None else bias.double()
    y = x @ weight.t() + bias
    terms = x.abs() @ weight.abs().t() + bias.abs()
    return y, torch.finfo(dtype).eps * y.abs() + (8 + x.shape[-1] / 8) * SINGLE * terms + torch.finfo(dtype).tiny


def largest_scores(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Of each query and head [..., T, H, 1], at most: by Cauchy and Schwarz, over keys [..., S, Hkv, D]; NaN in hidden
    keys is left out.
    """
    longest = k.double().nan_to_num(0.0).norm(dim=-1).max() if k.numel() else 0.0
    return abs(q.shape[-1] ** -0.5 if scale is None else scale) * q.double().norm(dim=-1, keepdim=True) * longest


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    truth: torch.Tensor,
    magnitude: torch.Tensor,
    dtype: torch.dtype,
    *,
    scale: float | None,
    added: torch.Tensor | float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far elements of out [..., T, H, D] may be off, and scores and log-sum-exps [..., T, H, 1]: the errors of
    scores become relative ones of probabilities. ``magnitude``: the same attention over |v|; ``added``: the largest
    mask value that counts.
    """
    head_dim, keys, largest = q.shape[-1], k.shape[-3], largest_scores(q, k, scale)
    scores = (8 + head_dim / 8) * SINGLE * largest + 2 * SINGLE * added
    probabilities = 2 * scores + 16 * SINGLE * (1 + 2 * largest + added) + (8 + keys / 8) * SINGLE
    if dtype is torch.bfloat16:  # the pair dot product takes them in bf16
        probabilities = probabilities + torch.finfo(dtype).eps
    slack = torch.finfo(dtype).eps * truth.abs() + probabilities * magnitude + torch.finfo(dtype).tiny
    return slack, scores + (16 + keys / 8) * SINGLE


def assert_within(what: str, out: torch.Tensor, truth: torch.Tensor, slack: torch.Tensor | float) -> None:
    """Every element of ``out`` is ``truth`` (in infinities and NaN, too) or no farther from it than ``slack``."""
    assert out.shape == truth.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    wide = out.double()
    good = (wide == truth) | ((wide - truth).abs() <= slack) | (wide.isnan() & truth.isnan())
    if not bool(good.all()):
        first = tuple((~good).nonzero()[0].tolist())
        allowed = slack if isinstance(slack, float) else slack.expand(truth.shape)[first].item()
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {good.numel()} elements are wrong, the first at {first}: got "
            f"{wide[first].item()}, "
            f"truth {truth[first].item()}, allowed {allowed:.3e}"
        )
