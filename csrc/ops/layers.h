// Whole layers for inference: one call from Python per layer.
#pragma once
#include "attention.h"
#include "linear.h"

namespace qvl {

struct DecoderLayerArgs {
  const void* x;  // [B, T, C] contiguous
  void* out;      // [B, T, C] contiguous; may not alias x
  const void *input_norm, *q_norm, *k_norm, *post_norm;
  Weight q, k, v, o, gate, up, down;
  CosSinView cos, sin;           // [B or 1, T, D], dtype of x
  MutableView k_cache, v_cache;  // the KV cache [B, Hkv, S_cap, D], S_cap along stride_t; [past, past + T) are written
  int64_t batch, queries, past, hidden, heads, kv_heads, head_dim, mlp;
  MaskView mask;  // replaces the causal rule
  float eps, scale;
  DType dtype;
};
void run_decoder_layer(const DecoderLayerArgs& args);

struct VisionBlockArgs {
  const void* x;  // [N, C] contiguous
  void* out;      // [N, C] contiguous; may not alias x
  const void *norm1_w, *norm1_b, *norm2_w, *norm2_b;
  Weight qkv, proj, fc1, fc2;
  CosSinView cos, sin;        // [N, D], fp32
  const int32_t* cu_seqlens;  // [sequences + 1]
  int64_t sequences, tokens, hidden, heads, head_dim, mlp;
  float eps, scale;
  DType dtype;
};
void run_vision_block(const VisionBlockArgs& args);

}  // namespace qvl
