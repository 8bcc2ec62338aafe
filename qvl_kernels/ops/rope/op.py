"""torch ops qvl::qk_norm_rope, qvl::vision_rope, their backward, and qvl::qk_norm_rope_to_cache for inference."""

from typing import Any

import torch

from qvl_kernels.library import call, differentiable_gradients, register
from qvl_kernels.ops.rope.cpu import (
    qk_norm_rope_backward_cpu,
    qk_norm_rope_cpu,
    qk_norm_rope_to_cache_cpu,
    vision_rope_backward_cpu,
    vision_rope_cpu,
)
from qvl_kernels.ops.rope.reference import qk_norm_rope_reference, vision_rope_reference

__all__ = ["qk_norm_rope_op", "qk_norm_rope_to_cache_op", "vision_rope_op"]


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch_qk_norm_rope_backward(*args: Any) -> Any:
    from qvl_kernels.ops.rope.triton_rope import launch_qk_norm_rope_backward

    return launch_qk_norm_rope_backward(*args)


def _launch_vision_rope_backward(*args: Any) -> Any:
    from qvl_kernels.ops.rope.triton_rope import launch_vision_rope_backward

    return launch_vision_rope_backward(*args)


def _launch_qk_norm_rope(*args: Any) -> Any:
    from qvl_kernels.ops.rope.triton_rope import launch_qk_norm_rope

    return launch_qk_norm_rope(*args)


def _launch_qk_norm_rope_to_cache(*args: Any) -> Any:
    from qvl_kernels.ops.rope.triton_rope import launch_qk_norm_rope_to_cache

    return launch_qk_norm_rope_to_cache(*args)


def _launch_vision_rope(*args: Any) -> Any:
    from qvl_kernels.ops.rope.triton_rope import launch_vision_rope

    return launch_vision_rope(*args)


qk_norm_rope_backward_op = register(
    "qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, "
    "Tensor cos, Tensor sin,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=qk_norm_rope_backward_cpu,
    triton=_launch_qk_norm_rope_backward,
    fake=lambda grad_q, grad_k, q, k, q_weight, k_weight, *rest: (_like(q), _like(k), _like(q_weight), _like(k_weight)),
)
vision_rope_backward_op = register(
    "vision_rope_backward(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    cpu=vision_rope_backward_cpu,
    triton=_launch_vision_rope_backward,
    fake=lambda grad_q, grad_k, *tables: (_like(grad_q), _like(grad_k)),
)


def _setup(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *call(qk_norm_rope_backward_op, grad_q, grad_k, *ctx.saved_tensors, ctx.eps), None, None, None


def _double_backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *inputs, cos, sin = ctx.saved_tensors
    gradients = differentiable_gradients(
        lambda q, k, q_weight, k_weight: qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, ctx.eps),
        inputs,
        (grad_q, grad_k),
    )
    return *gradients, None, None, None


def _vision_setup(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])


def _vision_backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *call(vision_rope_backward_op, grad_q, grad_k, *ctx.saved_tensors), None, None


def _vision_double_backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The map is linear in q and k, so its backward is differentiable as the same map."""
    q, k = (torch.zeros_like(grad, requires_grad=True) for grad in (grad_q, grad_k))
    gradients = differentiable_gradients(
        lambda q, k: vision_rope_reference(q, k, *ctx.saved_tensors), (q, k), (grad_q, grad_k)
    )
    return *gradients, None, None


qk_norm_rope_op = register(
    "qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps) -> "
    "(Tensor, Tensor)",
    cpu=qk_norm_rope_cpu,
    triton=_launch_qk_norm_rope,
    fake=lambda q, k, *rest: (_like(q), _like(k)),
    backward=_backward,
    double_backward=_double_backward,
    setup_context=_setup,
)
# Returns the rotated q and writes k and v to positions past + lengths[b] + t of the caches [B, Hkv, S_cap, D], not
# outside of them. ``table``: a layer's row of GrowingCaches.table, from which GPU kernels read the caches' addresses.
qk_norm_rope_to_cache_op = register(
    "qk_norm_rope_to_cache(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "Tensor(a!) k_cache,"
    " Tensor(b!) v_cache, Tensor? lengths, int past, float eps, Tensor? table=None) -> Tensor",
    cpu=qk_norm_rope_to_cache_cpu,
    triton=_launch_qk_norm_rope_to_cache,
    fake=lambda q, *rest: _like(q),
)
vision_rope_op = register(
    "vision_rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    cpu=vision_rope_cpu,
    triton=_launch_vision_rope,
    fake=lambda q, k, *tables: (_like(q), _like(k)),
    backward=_vision_backward,
    double_backward=_vision_double_backward,
    setup_context=_vision_setup,
)
