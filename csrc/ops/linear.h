// Linear layers over weights of any format: GEMV for up to 16 rows of activations, panel GEMM for more.
#pragma once
#include "../cpu/dispatch.h"

namespace qvl {

// Activations [m, k] that one or more linear layers read. norm: the prologue that writes x, if there is one; it runs on
// a block of rows right before they are read, so that they come from the caches.
struct LinearInput {
  const void* x;
  int64_t stride, m, k;
  DType dtype;
  const NormArgs* norm = nullptr;
  int64_t norm_row = 0;  // the norm's row that is row 0 here
};

inline void run_norm_prologue(const LinearInput& input, int64_t begin, int64_t end) {
  if (input.norm) kernels().norm_rows(*input.norm, input.norm_row + begin, input.norm_row + end);
}

// The call with its output and residual beginning at `row`.
inline LinearCall from_row(LinearCall call, int64_t row, int64_t element_bytes) {
  if (call.out) call.out = static_cast<char*>(call.out) + row * call.out_stride * element_bytes;
  if (call.residual)
    call.residual = static_cast<const char*>(call.residual) + row * call.residual_stride * element_bytes;
  return call;
}

constexpr int kMaxCalls = 4;       // over the same input in one call
constexpr int64_t kChunkM = 2048;  // rows whose panels are held at once

// body(chunk, row) for chunks of at most kChunkM rows, the first of them `row`: scratch does not grow with m.
template <class Body>
inline void for_chunks(const LinearInput& input, const Body& body) {
  for (int64_t row = 0; row < input.m; row += kChunkM) {
    LinearInput chunk = input;
    chunk.x = static_cast<const char*>(input.x) + row * input.stride * dtype_bytes(input.dtype);
    chunk.m = input.m - row < kChunkM ? input.m - row : kChunkM;
    chunk.norm_row += row;
    body(chunk, row);
  }
}

// The faster GEMM backend of this machine for the dtype. bf16_dot needs k, and where panels are chained n, to be even.
GemmBackend gemm_backend(DType dtype, int64_t k, int64_t n);

// Up to this many activation rows go through GEMV, where it is faster than GEMM.
inline int64_t gemv_max_m(const LinearCall& call) {
  if (call.weight.format == WeightFormat::int4) return kQuantGemvMaxM;
  return kernels().has_tiles ? kTileGemvMaxM : kGemvMaxM;
}

// All calls over the same input; calls of one format beside each other share a parallel region.
void run_linears(LinearInput input, const LinearCall* calls, int count);

// down(act(first(x))) [+ down.residual]. What first computes stays in panel layout, or in a small buffer for few rows.
void run_mlp(const LinearInput& input, const LinearCall& first, const LinearCall& down);

}  // namespace qvl
