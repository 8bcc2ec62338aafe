// Linear layers on the CPU: matrix-vector products for few rows, panel GEMM for more.
#pragma once
#include "../cpu/dispatch.h"

namespace qvl {

struct Weight {
  const void* w;     // [n, k]: elements of the rows' dtype, int8 values, or nibbles
  int64_t stride;    // of rows, in elements; in bytes for int4
  const void* bias;  // [n] or nullptr
  WeightFormat format = WeightFormat::dense;
  const void* scales = nullptr;  // int8: fp32 [n]; int4: bf16 [n][k padded / group]
  int64_t scale_stride = 0;
  int64_t group = 0;  // int4: inputs per scale
};

// out [m, n] = act(x [m, k] W^T + bias) + residual
struct LinearCall {
  Weight weight;
  const Weight* up = nullptr;  // swiglu: weight is the gate; both in one format
  int64_t n = 0;
  Activation activation = Activation::none;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  void* out = nullptr;
  int64_t out_stride = 0;
};

// Rows of activations that one or more linear layers read.
struct Rows {
  const void* x;
  int64_t stride, m, k;
  DType dtype;
  const NormArgs* norm =
      nullptr;  // what fills x, if anything: a block of rows right before it is read, while it is in the caches
  int64_t norm_row = 0;  // the first of its rows
};

inline void norm_prologue(const Rows& rows, int64_t begin, int64_t end) {
  if (rows.norm) kernels().norm_rows(*rows.norm, rows.norm_row + begin, rows.norm_row + end);
}

// The call with its output and residual beginning at `row`.
inline LinearCall from_row(LinearCall call, int64_t row, int64_t element) {
  if (call.out) call.out = static_cast<char*>(call.out) + row * call.out_stride * element;
  if (call.residual) call.residual = static_cast<const char*>(call.residual) + row * call.residual_stride * element;
  return call;
}

// At most `count` rows, the first of them `row`.
inline Rows from_row(Rows rows, int64_t row, int64_t count) {
  rows.x = static_cast<const char*>(rows.x) + row * rows.stride * dtype_bytes(rows.dtype);
  rows.m = rows.m - row < count ? rows.m - row : count;
  rows.norm_row += row;
  return rows;
}

constexpr int kMaxCalls = 4;       // over the same rows in one call
constexpr int64_t kChunkM = 2048;  // rows whose panels are held at once

// The faster GEMM backend of this machine for the dtype. dot needs k, and where panels are chained n, to be even.
GemmBackend gemm_backend(DType dtype, int64_t k, int64_t n);

// All calls over the same rows; calls of one format beside each other share a parallel region.
void run_linears(Rows rows, const LinearCall* calls, int count);

// down(act(first(x))) [+ down.residual]: the activations between stay in panel layout (or in a small buffer for few
// rows). hidden is first's n. Rows are processed in chunks, so scratch does not grow with m.
void run_mlp(const Rows& rows, const LinearCall& first, const LinearCall& down);

}  // namespace qvl
