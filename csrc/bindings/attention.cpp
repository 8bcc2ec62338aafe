// Python binding of attention.
#include "../ops/attention.h"

#include "common.h"

namespace qvl {

void bind_attention(py::module_& m) {
  m.def(
      "attention",
      [](Ptr q, Ptr k, Ptr v, Ptr out_, Ptr lse, int64_t batch, int64_t queries, int64_t keys, int64_t heads,
         int64_t kv_heads, int64_t head_dim, Strides q_s, Strides k_s, Strides v_s, Strides out_s, float scale,
         bool causal, Ptr key_counts, Ptr cu_seqlens, int mask_kind, Ptr mask, std::array<int64_t, 4> mask_s,
         int dtype) {
        if (head_dim > kMaxHeadDim) throw std::invalid_argument("attention: head_dim must be at most 512");
        AttentionArgs a{};
        a.q = view(q, q_s), a.k = view(k, k_s), a.v = view(v, v_s), a.out = mutable_view(out_, out_s);
        a.lse = static_cast<float*>(out(lse));
        a.batch = batch, a.queries = queries, a.keys = keys;
        a.heads = heads, a.kv_heads = kv_heads, a.head_dim = head_dim;
        a.scale = scale, a.causal = causal;
        a.key_counts = static_cast<const int64_t*>(in(key_counts));
        a.cu_seqlens = static_cast<const int32_t*>(in(cu_seqlens));
        a.mask = mask_view(mask_kind, mask, mask_s);
        a.dtype = to_dtype(dtype);
        py::gil_scoped_release release;
        run_attention(a);
      },
      "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "batch"_a, "queries"_a, "keys"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
      "q_strides"_a, "k_strides"_a, "v_strides"_a, "out_strides"_a, "scale"_a, "causal"_a, "key_counts"_a,
      "cu_seqlens"_a, "mask_kind"_a, "mask"_a, "mask_strides"_a, "dtype"_a,
      "Scaled dot-product attention; varlen when cu_seqlens is given");
}

}  // namespace qvl
