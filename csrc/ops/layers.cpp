// A decoder layer and a vision block, op by op over scratch memory.
#include "layers.h"

#include <cstring>

#include "../threads.h"
#include "../workspace.h"
#include "rope.h"

namespace qvl {

namespace {

// Scratch rows of one layer call, kept per calling thread.
struct LayerScratch {
  Workspace rows, qkv;  // rows: normed hidden states or attention output, whichever is alive
};
LayerScratch& layer_scratch() {
  thread_local LayerScratch scratch;
  return scratch;
}

NormArgs norm(const void* x, const void* weight, const void* bias, void* y, int64_t size, float eps, DType dtype) {
  NormArgs args{};
  args.x = x, args.weight = weight, args.bias = bias, args.y = y;
  args.size = size, args.x_stride = size, args.y_stride = size;
  args.eps = eps, args.dtype = dtype;
  return args;
}

void* head_at(const MutableView& view, int64_t b, int64_t t, int64_t h, int64_t element_bytes) {
  return static_cast<char*>(view.data) + (b * view.stride_b + t * view.stride_t + h * view.stride_h) * element_bytes;
}

// The view with its tokens from t on.
MutableView from_token(MutableView view, int64_t t, int64_t element_bytes) {
  view.data = head_at(view, 0, t, 0, element_bytes);
  return view;
}

LinearCall call(const Weight& weight, int64_t n, void* out, int64_t out_stride) {
  LinearCall linear;
  linear.weight = weight;
  linear.n = n;
  linear.out = out, linear.out_stride = out_stride;
  return linear;
}

}  // namespace

void run_decoder_layer(const DecoderLayerArgs& a) {
  const int64_t rows = a.batch * a.queries, size = dtype_bytes(a.dtype);
  const int64_t q_width = a.heads * a.head_dim, kv_width = a.kv_heads * a.head_dim, qkv_width = q_width + 2 * kv_width;
  if (rows == 0) return;
  LayerScratch& scratch = layer_scratch();
  char* normed = scratch.rows.get<char>(rows * (a.hidden > q_width ? a.hidden : q_width) * size);
  char* q = scratch.qkv.get<char>(rows * qkv_width * size);
  char* k = q + q_width * size;
  char* v = k + kv_width * size;
  char* attended = normed;

  const NormArgs input_norm = norm(a.x, a.input_norm, nullptr, normed, a.hidden, a.eps, a.dtype);
  const LinearCall qkv[3] = {call(a.q, q_width, q, qkv_width), call(a.k, kv_width, k, qkv_width),
                             call(a.v, kv_width, v, qkv_width)};
  run_linears(LinearInput{normed, a.hidden, rows, a.hidden, a.dtype, &input_norm}, qkv, 3);

  const auto heads_of = [&](void* data) { return MutableView{data, a.queries * qkv_width, qkv_width, a.head_dim}; };
  const MutableView new_k = from_token(a.k_cache, a.past, size), new_v = from_token(a.v_cache, a.past, size);
  RopeArgs rope{};
  rope.q_out = heads_of(q), rope.q = read_only(rope.q_out);
  rope.k = read_only(heads_of(k)), rope.k_out = new_k;
  rope.q_weight = a.q_norm, rope.k_weight = a.k_norm;
  rope.cos = a.cos, rope.sin = a.sin;
  rope.cos_sin_dtype = a.dtype;
  rope.batch = a.batch, rope.time = a.queries, rope.heads = a.heads, rope.kv_heads = a.kv_heads,
  rope.head_dim = a.head_dim;
  rope.eps = a.eps, rope.dtype = a.dtype;
  run_qk_norm_rope(rope);
  parallel_ranges(rows, 1 + 65536 / (kv_width * size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t h = 0; h < a.kv_heads; ++h)
        std::memcpy(head_at(new_v, row / a.queries, row % a.queries, h, size),
                    v + (row * qkv_width + h * a.head_dim) * size, size_t(a.head_dim * size));
  });

  AttentionArgs attention{};
  attention.q = rope.q, attention.k = read_only(a.k_cache), attention.v = read_only(a.v_cache);
  attention.out = {attended, a.queries * q_width, q_width, a.head_dim};
  attention.batch = a.batch, attention.queries = a.queries, attention.keys = a.past + a.queries;
  attention.heads = a.heads, attention.kv_heads = a.kv_heads, attention.head_dim = a.head_dim;
  attention.scale = a.scale;
  attention.causal = a.mask.kind == MaskKind::none;
  attention.mask = a.mask;
  attention.dtype = a.dtype;
  run_attention(attention);

  // The residual stream after attention lies in out until the MLP's epilogue adds to it.
  LinearCall o = call(a.o, a.hidden, a.out, a.hidden);
  o.residual = a.x, o.residual_stride = a.hidden;
  run_linears(LinearInput{attended, q_width, rows, q_width, a.dtype}, &o, 1);

  const NormArgs post_norm = norm(a.out, a.post_norm, nullptr, normed, a.hidden, a.eps, a.dtype);
  LinearCall gate = call(a.gate, a.mlp, nullptr, 0);
  gate.up = a.up;
  gate.activation = Activation::swiglu;
  LinearCall down = call(a.down, a.hidden, a.out, a.hidden);
  down.residual = a.out, down.residual_stride = a.hidden;
  run_mlp(LinearInput{normed, a.hidden, rows, a.hidden, a.dtype, &post_norm}, gate, down);
}

void run_vision_block(const VisionBlockArgs& a) {
  const int64_t rows = a.tokens, size = dtype_bytes(a.dtype), width = a.heads * a.head_dim;
  if (rows == 0) return;
  LayerScratch& scratch = layer_scratch();
  char* normed = scratch.rows.get<char>(rows * (a.hidden > width ? a.hidden : width) * size);
  char* q = scratch.qkv.get<char>(rows * 3 * width * size);
  char* attended = normed;

  const NormArgs norm1 = norm(a.x, a.norm1_w, a.norm1_b, normed, a.hidden, a.eps, a.dtype);
  const LinearCall qkv = call(a.qkv, 3 * width, q, 3 * width);
  run_linears(LinearInput{normed, a.hidden, rows, a.hidden, a.dtype, &norm1}, &qkv, 1);

  const auto heads_of = [&](void* data) { return MutableView{data, 0, 3 * width, a.head_dim}; };
  RopeArgs rope{};
  rope.q_out = heads_of(q), rope.q = read_only(rope.q_out);
  rope.k_out = heads_of(q + width * size), rope.k = read_only(rope.k_out);
  rope.cos = a.cos, rope.sin = a.sin;
  rope.cos_sin_dtype = DType::f32;
  rope.batch = 1, rope.time = rows, rope.heads = a.heads, rope.kv_heads = a.heads, rope.head_dim = a.head_dim;
  rope.dtype = a.dtype;
  run_qk_norm_rope(rope);

  AttentionArgs attention{};
  attention.q = rope.q, attention.k = rope.k, attention.v = read_only(heads_of(q + 2 * width * size));
  attention.out = {attended, 0, width, a.head_dim};
  attention.batch = a.sequences, attention.cu_seqlens = a.cu_seqlens;
  attention.heads = attention.kv_heads = a.heads, attention.head_dim = a.head_dim;
  attention.queries = attention.keys = rows;
  attention.scale = a.scale;
  attention.dtype = a.dtype;
  run_attention(attention);

  LinearCall proj = call(a.proj, a.hidden, a.out, a.hidden);
  proj.residual = a.x, proj.residual_stride = a.hidden;
  run_linears(LinearInput{attended, width, rows, width, a.dtype}, &proj, 1);

  const NormArgs norm2 = norm(a.out, a.norm2_w, a.norm2_b, normed, a.hidden, a.eps, a.dtype);
  LinearCall fc1 = call(a.fc1, a.mlp, nullptr, 0);
  fc1.activation = Activation::gelu_tanh;
  LinearCall fc2 = call(a.fc2, a.hidden, a.out, a.hidden);
  fc2.residual = a.out, fc2.residual_stride = a.hidden;
  run_mlp(LinearInput{normed, a.hidden, rows, a.hidden, a.dtype, &norm2}, fc1, fc2);
}

}  // namespace qvl
