// One struct of plain function pointers per instruction set. Ops (csrc/ops) split work over threads and call the table.
#pragma once
#include "../dtype.h"

namespace qvl {

// y = norm(x [+ residual]) * weight [+ bias], one row of `size` elements at a time. Strides in elements.
struct NormArgs {
  const void* x;
  const void* residual;  // or nullptr
  const void* weight;
  const void* bias;      // layer norm only; nullptr means RMS norm
  void* y;
  void* sum;             // x + residual, or nullptr
  int64_t size;
  int64_t x_stride, residual_stride, y_stride, sum_stride;
  float eps;
  DType dtype;
};

// How a GEMM multiplies: widen weights to fp32 and use FMA, or multiply bf16 pairs with a dot instruction.
enum class Route : int { fma = 0, dot = 1 };

// Activations as panels of `panel_width` rows, transposed so that rows are vector lanes:
// fma: float [K][width]; dot: uint32 [K / 2][width], each a pair (k, k + 1) of bf16. The last panel is narrower
// (a multiple of the vector width), its unused lanes are zero.
struct PackArgs {
  const void* x;          // [M, K] rows
  int64_t x_stride;
  int64_t m, k;
  DType dtype;            // of x
  Route route;
  void* panels;
};

enum class Activation : int { none = 0, gelu_tanh = 1, swiglu = 2 };

// out = act(A * W^T + bias) + residual. A comes as panels; W rows are used as they lie in memory.
struct GemmArgs {
  const void* panels;
  int64_t m, n, k;
  Route route;
  const void* w;          // [n, k] with row stride w_stride
  const void* w2;         // swiglu only: up projection; w is the gate
  int64_t w_stride, w2_stride;
  const void* bias;       // [n] or nullptr
  DType dtype;            // of weights, bias, residual and row-major output
  Activation activation;
  const void* residual;   // [m, n] or nullptr
  int64_t residual_stride;
  void* out;              // row-major [m, n], or panels for the next GEMM when out_panels
  int64_t out_stride;
  bool out_panels;
};

// y[m, n] = x[m, :] . w[n, :] for few rows, at memory bandwidth. x is prepared by gemv_prepare.
struct GemvArgs {
  const float* x;         // [m][k_padded] prepared
  int64_t m, n, k, k_padded;
  const void* w;
  const void* w2;         // swiglu only
  int64_t w_stride, w2_stride;
  const void* bias;
  DType dtype;
  Activation activation;
  const void* residual;
  int64_t residual_stride;
  void* out;              // [m, n]
  int64_t out_stride;
};

struct KernelTable {
  const char* name;
  int vector_width;       // fp32 lanes
  int panel_width;        // activation rows per GEMM panel
  void (*norm_rows)(const NormArgs&, int64_t begin, int64_t end);
  void (*gemm_pack)(const PackArgs&, int64_t panel);
  void (*gemm_task)(const GemmArgs&, int64_t n_begin, int64_t n_end, int64_t panel_begin, int64_t panel_end, float* scratch);
  void (*gemv_prepare)(const void* x, DType dtype, int64_t k, float* out);
  void (*gemv_rows)(const GemvArgs&, int64_t n_begin, int64_t n_end);
  float (*read_bytes)(const char* data, int64_t bytes);
  bool has_dot;           // Route::dot is available in gemm_pack and gemm_task
};

// GEMM blocking. A task is kGemmRows weight rows (half of them gate, half up for swiglu) by up to kGemmPanels panels.
// Sized so that one panel's k-block (256 KB), the task's widened weights (384 KB) and its accumulators fit in a
// 1 MB L2 cache with AVX-512 panels.
constexpr int64_t kGemmRows = 96;
constexpr int64_t kGemmPanels = 8;
constexpr int64_t kGemmDepth = 1024;  // 32-bit words of k: floats, or bf16 pairs
constexpr int64_t kGemmDepthFp32 = 128;

// Scratch of one gemm_task: accumulators and widened weights.
inline int64_t gemm_scratch_floats(const KernelTable& table) {
  return kGemmPanels * kGemmRows * table.panel_width + kGemmRows * kGemmDepth;
}

struct Target {
  const char* name;
  bool (*supported)();    // cpuid and operating-system state; baseline code
  const KernelTable* table;
};

// The chosen target's table: the best supported one, or the one that QVL_CPU_ISA names.
const KernelTable& kernels();

}  // namespace qvl
