#include "../ops/rope.h"

#include <array>

#include "common.h"

namespace qvl {

void bind_rope(py::module_& m) {
  using Strides = std::array<int64_t, 3>;  // batch, time, head
  m.def(
      "qk_norm_rope",
      [](Ptr q, Ptr k, Ptr q_out, Ptr k_out, Strides q_s, Strides k_s, Strides q_out_s, Strides k_out_s, Ptr q_weight,
         Ptr k_weight, Ptr cos, Ptr sin, std::array<int64_t, 2> cos_s, std::array<int64_t, 2> sin_s, int cos_sin_dtype,
         int64_t batch, int64_t time, int64_t heads, int64_t kv_heads, int64_t head_dim, float eps, int dtype) {
        RopeArgs a{};
        a.q = in(q), a.k = in(k), a.q_out = out(q_out), a.k_out = out(k_out);
        a.q_b = q_s[0], a.q_t = q_s[1], a.q_h = q_s[2];
        a.k_b = k_s[0], a.k_t = k_s[1], a.k_h = k_s[2];
        a.q_out_b = q_out_s[0], a.q_out_t = q_out_s[1], a.q_out_h = q_out_s[2];
        a.k_out_b = k_out_s[0], a.k_out_t = k_out_s[1], a.k_out_h = k_out_s[2];
        a.q_weight = in(q_weight), a.k_weight = in(k_weight);
        a.cos = in(cos), a.sin = in(sin);
        a.cos_b = cos_s[0], a.cos_t = cos_s[1], a.sin_b = sin_s[0], a.sin_t = sin_s[1];
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
