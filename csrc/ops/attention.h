// Scaled dot-product attention on the CPU: tiles of 'panel_width' query rows as vector lanes, online softmax.
#pragma once
#include "../cpu/kernel_table.h"

namespace qvl {

enum class MaskKind : int { none = 0, boolean = 1, additive = 2 };  // boolean: nonzero byte = visible; additive: dtype as q

struct AttentionArgs {
  const void* q;  // [B, T, H, D] by strides in elements; D contiguous
  const void* k;  // [B, S, Hkv, D]
  const void* v;  // [B, S, Hkv, D]
  void* out;      // [B, T, H, D]
  float* lse;     // [B, H, T] contiguous (natural log, -inf for rows that see nothing), or nullptr
  int64_t batch, queries, keys, heads, kv_heads, head_dim;
  int64_t q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, out_b, out_t, out_h;
  float scale;
  bool causal;                // query i of a sequence of T sees keys <= S_b - T + i, S_b the sequence's key count
  const int64_t* key_counts;  // [B] visible keys (a prefix), or nullptr for all
  const int32_t* cu_seqlens;  // [B + 1]: q, k, v, out are packed [N, ...], strides *_b unused; or nullptr
  MaskKind mask_kind;
  const void* mask;           // [B, H, T, S] by strides (0 where broadcast)
  int64_t mask_b, mask_h, mask_t, mask_s;
  DType dtype;
};

// Rows that see no key give 0. Splits over (batch, head, query block), and over keys when queries are few.
void run_attention(const AttentionArgs& args);

}  // namespace qvl
