"""torch ops qvl::attention and its backward."""

from typing import Any

import torch

from qvl_kernels.library import call, differentiable_gradients, register
from qvl_kernels.ops.attention.cpu import attention_backward_cpu, attention_cpu
from qvl_kernels.ops.attention.reference import attention_reference, varlen_attention_reference

__all__ = ["attention_backward_op", "attention_op"]


def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    key_counts: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, queries = q.shape[-2], q.shape[-3]
    lse_shape = (heads, queries) if cu_seqlens is not None else (q.shape[0], heads, queries)
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(lse_shape, dtype=torch.float32, device=q.device),
    )


def _attention_backward_fake(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    key_counts: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    mask_grad: bool,
) -> tuple[torch.Tensor, ...]:
    shapes = (q.shape, k.shape, v.shape, mask.shape if mask is not None and mask_grad else (0,))
    return tuple(torch.empty(shape, dtype=q.dtype, device=q.device) for shape in shapes)


def _launch_attention_backward(*args: Any) -> Any:
    from qvl_kernels.ops.attention.triton_attention_backward import launch_attention_backward

    return launch_attention_backward(*args)


def _launch_attention(*args: Any) -> Any:
    from qvl_kernels.ops.attention.triton_attention import launch_attention

    return launch_attention(*args)


# The backward is its own op: its work depends on the values of cu_seqlens, which tracing does not know.
attention_backward_op = register(
    "attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? cu_seqlens,"
    " Tensor? key_counts, Tensor? mask, bool causal, float scale, float dropout_p, Tensor? seed, bool mask_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=attention_backward_cpu,
    triton=_launch_attention_backward,
    fake=_attention_backward_fake,
)


def _setup(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, key_counts, mask, ctx.causal, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, key_counts, mask, seed, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    q, k, v, cu_seqlens, key_counts, mask, seed, out, lse = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    mask_grad = ctx.needs_input_grad[5]
    dq, dk, dv, dmask = call(
        attention_backward_op,
        grad,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens,
        key_counts,
        mask,
        ctx.causal,
        ctx.scale,
        ctx.dropout_p,
        seed,
        mask_grad,
    )
    return dq, dk, dv, None, None, dmask if mask_grad else None, None, None, None, None


def _double_backward(
    ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, cu_seqlens, key_counts, mask, *_ = ctx.saved_tensors
    if ctx.dropout_p > 0.0:  # the reference draws another dropout keep mask
        return _backward(ctx, grad, grad_lse)
    options, inputs = {"causal": ctx.causal, "scale": ctx.scale}, (q, k, v)
    if cu_seqlens is not None:
        dq, dk, dv = differentiable_gradients(
            lambda q, k, v: varlen_attention_reference(q, k, v, cu_seqlens, dropout_p=0.0, **options),
            inputs,
            (grad, grad_lse),
        )
        return dq, dk, dv, *[None] * 7
    seen = None if key_counts is None else torch.arange(k.shape[1], device=k.device)[None] < key_counts[:, None]
    if mask is not None:  # keys masked for all queries may hold NaN, and 0 * NaN is NaN
        masked = (mask if mask.dtype == torch.bool else mask > float("-inf")).flatten(1, 2).any(1).expand(k.shape[:2])
        seen = masked if seen is None else seen & masked
    differentiable_mask = (mask,) if mask is not None and mask.requires_grad else ()

    def function(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *masks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_reference(q, k, v, key_padding_mask=seen, mask=masks[0] if masks else mask, **options)

    dq, dk, dv, *dmask = differentiable_gradients(function, (*inputs, *differentiable_mask), (grad, grad_lse))
    return dq, dk, dv, None, None, dmask[0] if dmask else None, *[None] * 4


# Dropout (Triton only) derives its keep mask from ``seed``, int64 [1]; the backward derives the same one.
attention_op = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor? key_counts, Tensor? mask, bool causal, "
    "float scale,"
    " float dropout_p=0.0, Tensor? seed=None) -> (Tensor, Tensor)",
    cpu=attention_cpu,
    triton=_launch_attention,
    fake=_attention_fake,
    backward=_backward,
    double_backward=_double_backward,
    setup_context=_setup,
)
