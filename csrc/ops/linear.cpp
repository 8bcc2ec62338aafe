#include "linear.h"

#include <chrono>
#include <vector>

#include "../threads.h"

namespace qvl {

namespace {

Workspace& gemm_scratch() {
  thread_local Workspace scratch;
  return scratch;
}

double time_route(Route route) {
  const KernelTable& table = kernels();
  const int64_t m = table.panel_width, n = kGemmRows, k = 2048;
  Workspace panels_ws, w_ws, out_ws;
  float* panels = panels_ws.get<float>(m * k);
  bf16* w = w_ws.get<bf16>(n * k);
  bf16* out = out_ws.get<bf16>(m * n);
  for (int64_t i = 0; i < m * k; ++i) panels[i] = bits_to_float(0x3f803f80u);
  for (int64_t i = 0; i < n * k; ++i) w[i].bits = 0x3f80;
  GemmArgs args{};
  args.panels = panels;
  args.m = m, args.n = n, args.k = k;
  args.route = route;
  args.w = w, args.w_stride = k;
  args.dtype = DType::bf16;
  args.out = out, args.out_stride = n;
  float* scratch = gemm_scratch().get<float>(gemm_scratch_floats(table));
  double best = 1e9;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    table.gemm_task(args, 0, n, 0, 1, scratch);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (seconds < best) best = seconds;
  }
  return best;
}

// The dot instruction is twice as fast as FMA on Zen 4/5 and half as fast on some Intel parts: measure, do not guess.
bool dot_is_faster() {
  static const bool faster = kernels().has_dot && time_route(Route::dot) < time_route(Route::fma);
  return faster;
}

}  // namespace

Route gemm_route(DType dtype, int64_t k, int64_t n) {
  if (dtype == DType::bf16 && k % 2 == 0 && n % 2 == 0 && dot_is_faster()) return Route::dot;
  return Route::fma;
}

int64_t panel_count(int64_t m) { return (m + kernels().panel_width - 1) / kernels().panel_width; }

int64_t panel_words(int64_t m, int64_t k, Route route) {
  return panel_count(m) * kernels().panel_width * (route == Route::dot ? k / 2 : k);
}

void pack_panels(const void* x, int64_t x_stride, int64_t m, int64_t k, DType dtype, Route route, float* panels) {
  const KernelTable& table = kernels();
  const PackArgs args{x, x_stride, m, k, dtype, route, panels};
  parallel_tasks(panel_count(m), [&](int64_t panel) { table.gemm_pack(args, panel); });
}

void run_gemm(const GemmArgs& args) {
  const KernelTable& table = kernels();
  const int64_t rows = args.activation == Activation::swiglu ? kGemmRows / 2 : kGemmRows;
  const int64_t n_tasks = (args.n + rows - 1) / rows;
  const int64_t panels = panel_count(args.m);
  const int64_t m_tasks = (panels + kGemmPanels - 1) / kGemmPanels;
  parallel_tasks(n_tasks * m_tasks, [&](int64_t task) {
    const int64_t n_begin = task / m_tasks * rows, panel_begin = task % m_tasks * kGemmPanels;
    const int64_t n_end = n_begin + rows < args.n ? n_begin + rows : args.n;
    const int64_t panel_end = panel_begin + kGemmPanels < panels ? panel_begin + kGemmPanels : panels;
    table.gemm_task(args, n_begin, n_end, panel_begin, panel_end,
                    gemm_scratch().get<float>(gemm_scratch_floats(table)));
  });
}

namespace {

void run_gemv(const LinearCall& call) {
  const KernelTable& table = kernels();
  const int64_t k = call.linear.k, block = 2 * table.vector_width;
  const int64_t k_padded = (k + block - 1) / block * block;
  thread_local Workspace prepared_ws, row_ws;
  float* prepared = prepared_ws.get<float>(call.m * k_padded);
  float* row = row_ws.get<float>(k);
  for (int64_t m = 0; m < call.m; ++m) {
    switch (call.dtype) {
      case DType::f32:
        for (int64_t i = 0; i < k; ++i) row[i] = static_cast<const float*>(call.x)[m * call.x_stride + i];
        break;
      case DType::bf16:
        for (int64_t i = 0; i < k; ++i) row[i] = to_float(static_cast<const bf16*>(call.x)[m * call.x_stride + i]);
        break;
      case DType::f16:
        for (int64_t i = 0; i < k; ++i) row[i] = to_float(static_cast<const f16*>(call.x)[m * call.x_stride + i]);
        break;
    }
    table.gemv_prepare(row, call.dtype, k, prepared + m * k_padded);
  }
  GemvArgs args{};
  args.x = prepared;
  args.m = call.m, args.n = call.linear.n, args.k = k, args.k_padded = k_padded;
  args.w = call.linear.w, args.w_stride = call.linear.stride;
  if (call.up) args.w2 = call.up->w, args.w2_stride = call.up->stride;
  args.bias = call.linear.bias;
  args.dtype = call.dtype;
  args.activation = call.activation;
  args.residual = call.residual, args.residual_stride = call.residual_stride;
  args.out = call.out, args.out_stride = call.out_stride;
  args.out_float = false;
  // 64 KB of weights a thread at least, or waking it costs more than it saves.
  const int64_t min_rows = 1 + 65536 / (k * dtype_bytes(call.dtype) + 1);
  parallel_ranges(args.n, min_rows, [&](int64_t begin, int64_t end) { table.gemv_rows(args, begin, end); });
}

}  // namespace

void run_linear(const LinearCall& call) {
  if (call.m == 0 || call.linear.n == 0) return;
  if (call.m <= kGemvMaxRows) return run_gemv(call);
  const Route route = gemm_route(call.dtype, call.linear.k, 2);
  thread_local Workspace panels_ws;
  float* panels = panels_ws.get<float>(panel_words(call.m, call.linear.k, route));
  pack_panels(call.x, call.x_stride, call.m, call.linear.k, call.dtype, route, panels);
  GemmArgs args{};
  args.panels = panels;
  args.m = call.m, args.n = call.linear.n, args.k = call.linear.k;
  args.route = route;
  args.w = call.linear.w, args.w_stride = call.linear.stride;
  if (call.up) args.w2 = call.up->w, args.w2_stride = call.up->stride;
  args.bias = call.linear.bias;
  args.dtype = call.dtype;
  args.activation = call.activation;
  args.residual = call.residual, args.residual_stride = call.residual_stride;
  args.out = call.out, args.out_stride = call.out_stride;
  run_gemm(args);
}

}  // namespace qvl
