// Linear layers on the CPU: matrix-vector products for few rows, panel GEMM for more.
#pragma once
#include "../cpu/kernel_table.h"
#include "../workspace.h"

namespace qvl {

struct Linear {
  const void* w;           // [n, k]
  int64_t n, k, stride;
  const void* bias;        // [n] or nullptr
};

// Up to this many rows go through gemv: memory bound, one pass over the weights.
constexpr int64_t kGemvMaxRows = 4;

// The faster GEMM route of this machine for the dtype; dot needs even k (and even n where panels are chained).
Route gemm_route(DType dtype, int64_t k, int64_t n);

int64_t panel_count(int64_t m);
// 32-bit words that panels of [m, k] take.
int64_t panel_words(int64_t m, int64_t k, Route route);

// x [m, k] -> panels.
void pack_panels(const void* x, int64_t x_stride, int64_t m, int64_t k, DType dtype, Route route, float* panels);

// Runs the GEMM that args describe over all threads.
void run_gemm(const GemmArgs& args);

// out [m, n] = act(x [m, k] W^T + bias) + residual, row-major, by whichever kernel suits m.
struct LinearCall {
  const void* x;
  int64_t x_stride, m;
  Linear linear;
  const Linear* up = nullptr;  // swiglu: linear is the gate
  Activation activation = Activation::none;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  void* out = nullptr;
  int64_t out_stride = 0;
  DType dtype;
};
void run_linear(const LinearCall& call);

}  // namespace qvl
