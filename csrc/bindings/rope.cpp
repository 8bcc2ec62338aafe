// Python binding of qk_norm_rope.
#include "../ops/rope.h"

#include "common.h"

namespace qvl {

void bind_rope(py::module_& m) {
  m.def(
      "qk_norm_rope",
      [](Ptr q, Ptr k, Ptr q_out, Ptr k_out, Strides q_s, Strides k_s, Strides q_out_s, Strides k_out_s, Ptr q_weight,
         Ptr k_weight, Ptr cos, Ptr sin, std::array<int64_t, 2> cos_s, std::array<int64_t, 2> sin_s, int cos_sin_dtype,
         int64_t batch, int64_t time, int64_t heads, int64_t kv_heads, int64_t head_dim, float eps, int dtype) {
        RopeArgs a{};
        a.q = view(q, q_s), a.k = view(k, k_s);
        a.q_out = mutable_view(q_out, q_out_s), a.k_out = mutable_view(k_out, k_out_s);
        a.q_weight = in(q_weight), a.k_weight = in(k_weight);
        a.cos = cos_sin_view(cos, cos_s), a.sin = cos_sin_view(sin, sin_s);
        a.cos_sin_dtype = to_dtype(cos_sin_dtype);
        a.batch = batch, a.time = time, a.heads = heads, a.kv_heads = kv_heads, a.head_dim = head_dim;
        a.eps = eps, a.dtype = to_dtype(dtype);
        py::gil_scoped_release release;
        run_qk_norm_rope(a);
      },
      "q"_a, "k"_a, "q_out"_a, "k_out"_a, "q_strides"_a, "k_strides"_a, "q_out_strides"_a, "k_out_strides"_a,
      "q_weight"_a, "k_weight"_a, "cos"_a, "sin"_a, "cos_strides"_a, "sin_strides"_a, "cos_sin_dtype"_a, "batch"_a,
      "time"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "eps"_a, "dtype"_a,
      "Per-head RMS norm (weights 0 for none) and rotary embedding of q and k");
}

}  // namespace qvl
