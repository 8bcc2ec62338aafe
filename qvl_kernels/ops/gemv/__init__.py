"""GEMV and small-M (skinny) GEMM of 1 to 16 tokens, bound by memory bandwidth. Internal ops for inference.

y = norm(x) w^T + bias + residual, and the fused SwiGLU silu(norm(x) gate^T) * (norm(x) up^T), over dense (fp32, bf16,
fp16) weights and the int8 and int4 formats of ``qvl_kernels.quantization``. ``triton_fma`` multiplies 1 to 4 tokens on
the FMA units, ``triton_dot`` more on the tensor cores; ``launch`` chooses. Each reads every weight once, with the norm
in the prologue and bias and residual in the epilogue.
"""

from qvl_kernels.ops.gemv.op import gemv_op, gemv_swiglu_op, quantized_gemv_op, quantized_gemv_swiglu_op

__all__ = ["gemv_op", "gemv_swiglu_op", "quantized_gemv_op", "quantized_gemv_swiglu_op"]
