"""Matrix-vector products of 1 to 16 rows at inference, bound by the bytes of the weights. Internal ops for layers and
models.

y = norm(x) w^T + bias + residual, and silu(norm(x) gate^T) * (norm(x) up^T), over fp32, bf16 and fp16 weights as they
lie and over the int8 and int4 formats of ``qvl_kernels.quantization``. One kernel multiplies 1 to 4 rows on the FMA
units (``triton_fma``), another more rows on the tensor cores (``triton_dot``); ``launch`` chooses. Both read every
weight once and fuse norm, bias and residual.
"""

from qvl_kernels.ops.gemv.op import gemv_op, gemv_swiglu_op, quantized_gemv_op, quantized_gemv_swiglu_op

__all__ = ["gemv_op", "gemv_swiglu_op", "quantized_gemv_op", "quantized_gemv_swiglu_op"]
