"""Public functions: qk_norm_rope, vision_rope."""

import torch

from qvl_kernels import checks, dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.rope.op import qk_norm_rope_op, vision_rope_op
from qvl_kernels.ops.rope.reference import qk_norm_rope_reference, vision_rope_reference

__all__ = ["MAX_HEAD_DIM", "NO_TABLE_GRADIENT", "qk_norm_rope", "vision_rope"]

MAX_HEAD_DIM = 512
NO_TABLE_GRADIENT = 'has no gradient of cos and sin; detach them, or use_backend("reference")'


def _check_qk(op: str, q: torch.Tensor, k: torch.Tensor, ndim: int) -> None:
    checks.check_tensor(op, "q", q, ndim)
    checks.check_tensor(op, "k", k, ndim)
    checks.check_same(op, q=q, k=k)
    checks.check_last_contiguous(op, q=q, k=k)
    if q.shape[-1] != k.shape[-1] or q.shape[:-2] != k.shape[:-2]:
        raise ValueError(f"{op}: q and k must agree but for their heads, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[-1] < 2 or q.shape[-1] % 2:
        raise ValueError(f"{op}: head_dim must be even to rotate halves, got {q.shape[-1]}")


def _unsupported(q: torch.Tensor) -> str | None:
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[-1]} (at most {MAX_HEAD_DIM})"
    return checks.unsupported_dtype(q)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of every head, then x cos + rotate_half(x) sin        [RoPE, arXiv:2104.09864; Qwen3VLTextAttention]

    Args:
        q: [B, T, H, D] fp32, bf16 or fp16; last dimension contiguous. k: [B, T, Hkv, D]. D even.
        q_weight, k_weight: [D], same dtype.
        cos, sin: [B or 1, T, D], same dtype, as Qwen3VLTextRotaryEmbedding returns them (M-RoPE sections interleaved);
            constants: a gradient is refused.
        eps: of the norm.
    Returns:
        (q, k), shapes as given. The rotation is computed in fp32 and rounded once.
    Raises: TypeError or ValueError for bad arguments; RuntimeError if cos or sin needs a gradient or a forced backend
    cannot run here.
    Example:
        >>> q, k = torch.randn(1, 5, 4, 64), torch.randn(1, 5, 2, 64)
        >>> one, table = torch.ones(64), torch.ones(1, 5, 64)
        >>> q, k = qvl_kernels.qk_norm_rope(q, k, one, one, table, table)
    """
    _check_qk("qk_norm_rope", q, k, 4)
    batch, time, _, head_dim = q.shape
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        checks.check_tensor("qk_norm_rope", name, weight, 1)
        checks.check_shape("qk_norm_rope", name, weight, (head_dim,))
    for name, table in (("cos", cos), ("sin", sin)):
        checks.check_tensor("qk_norm_rope", name, table, 3)
        if tuple(table.shape[1:]) != (time, head_dim) or table.shape[0] != 1 and table.shape[0] != batch:
            raise ValueError(
                f"qk_norm_rope: {name} must have shape [{batch} or 1, {time}, {head_dim}], got {tuple(table.shape)}"
            )
    checks.check_same("qk_norm_rope", q=q, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    checks.check_last_contiguous("qk_norm_rope", q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    eps = checks.check_eps("qk_norm_rope", eps)
    if dispatch.choose("qk_norm_rope", q.device, _unsupported(q)) == "reference":
        return qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, eps)
    checks.check_no_gradient("qk_norm_rope", NO_TABLE_GRADIENT, cos, sin)
    return call(qk_norm_rope_op, q, k, q_weight, k_weight, cos, sin, eps)


def vision_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x cos + rotate_half(x) sin of vision tokens, varlen        [apply_rotary_pos_emb_vision of Qwen3-VL]

    Args:
        q, k: [N, H, D] fp32, bf16 or fp16; last dimension contiguous. D even.
        cos, sin: [N, D], fp32 or q's dtype; constants: a gradient is refused.
    Returns:
        (q, k), computed in fp32 and rounded once.
    Raises: TypeError or ValueError for bad arguments; RuntimeError if cos or sin needs a gradient or a forced backend
    cannot run here.
    Example:
        >>> q, table = torch.randn(9, 4, 64), torch.ones(9, 64)
        >>> q, k = qvl_kernels.vision_rope(q, q, table, table)
    """
    _check_qk("vision_rope", q, k, 3)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.check_tensor("vision_rope", name, table, 2)
        checks.check_shape("vision_rope", name, table, (q.shape[0], q.shape[2]))
        checks.check_dtype("vision_rope", name, table, torch.float32, q.dtype)
        checks.check_device("vision_rope", name, table, q.device)
    checks.check_same("vision_rope", cos=cos, sin=sin)
    checks.check_last_contiguous("vision_rope", cos=cos, sin=sin)
    if dispatch.choose("vision_rope", q.device, _unsupported(q)) == "reference":
        return vision_rope_reference(q, k, cos, sin)
    checks.check_no_gradient("vision_rope", NO_TABLE_GRADIENT, cos, sin)
    return call(vision_rope_op, q, k, cos, sin)
