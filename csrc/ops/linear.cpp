#include "linear.h"

#include <chrono>

#include "../threads.h"
#include "../workspace.h"
#include "tile_scheduler.h"
#include "quant_linear.h"

namespace qvl {

namespace {

Workspace& gemm_scratch() {
  thread_local Workspace scratch;
  return scratch;
}

double time_gemm_backend(GemmBackend backend) {
  const KernelTable& table = kernels();
  const int64_t m = table.panel_width, n = kGemmTileN, k = 2048;
  Workspace panels_ws, w_ws, out_ws;
  float* panels = panels_ws.get<float>(m * k);
  bf16* w = w_ws.get<bf16>(n * k);
  bf16* out = out_ws.get<bf16>(m * n);
  for (int64_t i = 0; i < m * k; ++i) panels[i] = bits_to_float(0x3f803f80u);
  for (int64_t i = 0; i < n * k; ++i) w[i].bits = 0x3f80;
  GemmArgs args{};
  args.panels = panels;
  args.m = m, args.n = n, args.k = k;
  args.backend = backend;
  args.w = w, args.w_stride = k;
  args.dtype = DType::bf16;
  args.out = out, args.out_stride = n;
  float* scratch = gemm_scratch().get<float>(gemm_scratch_floats(table));
  double best = 1e9;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    table.gemm_tile(args, 0, n, 0, 1, scratch);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (seconds < best) best = seconds;
  }
  return best;
}

// The dot instruction is twice as fast as FMA on Zen 5 and half as fast on some Intel parts: measure, do not guess.
bool bf16_dot_is_faster() {
  if (!kernels().has_bf16_dot) return false;
  static const bool faster = time_gemm_backend(GemmBackend::bf16_dot) < time_gemm_backend(GemmBackend::fma);
  return faster;
}

// 32-bit words that panels of [m, k] take.
int64_t panel_words(int64_t m, int64_t k, GemmBackend backend) {
  return panel_count(m) * kernels().panel_width * (backend == GemmBackend::bf16_dot ? k / 2 : k);
}

void pack_panels(const Rows& rows, int64_t first_row, int64_t m, GemmBackend backend, float* panels) {
  const KernelTable& table = kernels();
  const char* x = static_cast<const char*>(rows.x) + first_row * rows.stride * dtype_bytes(rows.dtype);
  const GemmPackArgs args{x, rows.stride, m, rows.k, rows.dtype, backend, panels};
  parallel_tasks(panel_count(m), [&](int64_t panel) {
    const int64_t begin = panel * table.panel_width, end = begin + table.panel_width;
    norm_prologue(rows, first_row + begin, first_row + (end < m ? end : m));
    table.gemm_pack(args, panel);
  });
}

Workspace& panels_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

GemmArgs gemm_args(const LinearCall& call, const float* panels, int64_t m, int64_t k, GemmBackend backend,
                   DType dtype) {
  GemmArgs args{};
  args.panels = panels;
  args.m = m, args.n = call.n, args.k = k;
  args.backend = backend;
  args.w = call.weight.w, args.w_stride = call.weight.stride;
  if (call.up) args.w2 = call.up->w, args.w2_stride = call.up->stride;
  args.bias = call.weight.bias;
  args.dtype = dtype;
  args.activation = call.activation;
  args.residual = call.residual, args.residual_stride = call.residual_stride;
  args.out = call.out, args.out_stride = call.out_stride;
  return args;
}

int64_t tile_n(const GemmArgs& args) { return args.activation == Activation::swiglu ? kGemmTileN / 2 : kGemmTileN; }

void run_gemms(const GemmArgs* gemms, int count) {
  const KernelTable& table = kernels();
  parallel_gemms(gemms, count, tile_n,
                 [&](const auto& args, int64_t n_begin, int64_t n_end, int64_t panel_begin, int64_t panel_end) {
                   table.gemm_tile(args, n_begin, n_end, panel_begin, panel_end,
                                   gemm_scratch().get<float>(gemm_scratch_floats(table)));
                 });
}

void run_gemvs(const Rows& rows, const LinearCall* calls, int count) {
  const KernelTable& table = kernels();
  const int64_t block = 2 * table.vector_width;
  const int64_t k_padded = (rows.k + block - 1) / block * block;
  const GemmBackend backend = gemm_backend(rows.dtype, 2, 2);
  // One block of room between rows: rows of 4 KB on the other side would all want the same lines of L1.
  const int64_t x_stride = (backend == GemmBackend::bf16_dot ? k_padded / 2 : k_padded) + block;
  thread_local Workspace prepared_ws;
  float* prepared = prepared_ws.get<float>(rows.m * x_stride);
  const int64_t row_bytes = rows.stride * dtype_bytes(rows.dtype);
  norm_prologue(rows, 0, rows.m);
  for (int64_t m = 0; m < rows.m; ++m)
    table.gemv_prepare(static_cast<const char*>(rows.x) + m * row_bytes, rows.dtype, rows.k, backend,
                       prepared + m * x_stride);
  int64_t total = 0;
  for (int i = 0; i < count; ++i) total += calls[i].n;
  // 64 KB of weights a thread at least, or waking it costs more than it saves.
  const int64_t min_rows = 1 + 65536 / (rows.k * dtype_bytes(rows.dtype) + 1);
  parallel_ranges(total, min_rows, [&](int64_t begin, int64_t end) {
    int64_t offset = 0;
    for (int i = 0; i < count; ++i) {
      const LinearCall& call = calls[i];
      const int64_t n_begin = begin > offset ? begin - offset : 0;
      const int64_t n_end = end < offset + call.n ? end - offset : call.n;
      offset += call.n;
      if (n_begin >= n_end) continue;
      GemvArgs args{};
      args.x = prepared, args.x_stride = x_stride;
      args.m = rows.m, args.n = call.n, args.k = rows.k;
      args.backend = backend;
      args.w = call.weight.w, args.w_stride = call.weight.stride;
      if (call.up) args.w2 = call.up->w, args.w2_stride = call.up->stride;
      args.bias = call.weight.bias;
      args.dtype = rows.dtype;
      args.activation = call.activation;
      args.residual = call.residual, args.residual_stride = call.residual_stride;
      args.out = call.out, args.out_stride = call.out_stride;
      table.gemv_rows(args, n_begin, n_end);
    }
  });
}

void run_dense(const Rows& rows, const LinearCall* calls, int count) {
  if (rows.m <= kGemvMaxM) return run_gemvs(rows, calls, count);
  const GemmBackend backend = gemm_backend(rows.dtype, rows.k, 2);
  const int64_t chunk = rows.m < kChunkM ? rows.m : kChunkM, element = dtype_bytes(rows.dtype);
  float* panels = panels_workspace().get<float>(panel_words(chunk, rows.k, backend));
  GemmArgs gemms[kMaxCalls];
  for (int64_t row = 0; row < rows.m; row += chunk) {
    const int64_t m = rows.m - row < chunk ? rows.m - row : chunk;
    pack_panels(rows, row, m, backend, panels);
    for (int i = 0; i < count; ++i)
      gemms[i] = gemm_args(from_row(calls[i], row, element), panels, m, rows.k, backend, rows.dtype);
    run_gemms(gemms, count);
  }
}

bool quantized(const LinearCall& call) { return call.weight.format != WeightFormat::dense; }

}  // namespace

GemmBackend gemm_backend(DType dtype, int64_t k, int64_t n) {
  if (dtype == DType::bf16 && k % 2 == 0 && n % 2 == 0 && bf16_dot_is_faster()) return GemmBackend::bf16_dot;
  return GemmBackend::fma;
}

void run_linears(Rows rows, const LinearCall* calls, int count) {
  if (rows.m == 0) return;
  for (int begin = 0, end; begin < count; begin = end) {
    const Weight& first = calls[begin].weight;
    for (end = begin + 1;
         end < count && calls[end].weight.format == first.format && calls[end].weight.group == first.group;)
      ++end;
    if (first.format == WeightFormat::dense) {
      run_dense(rows, calls + begin, end - begin);
    } else {
      run_quant_linears(rows, calls + begin, end - begin);
    }
    rows.norm = nullptr;  // filled
  }
}

void run_mlp(const Rows& rows, const LinearCall& first, const LinearCall& down) {
  if (rows.m == 0) return;
  const int64_t hidden = first.n, element = dtype_bytes(rows.dtype);
  thread_local Workspace hidden_ws;
  if (rows.m > kQuantGemvMaxM && quantized(first) && quantized(down)) return run_quant_mlp(rows, first, down);
  const int64_t chunk = rows.m < kChunkM ? rows.m : kChunkM;
  if (rows.m <= kGemvMaxM || quantized(first) || quantized(down)) {
    LinearCall call = first;
    call.out = hidden_ws.get<char>(chunk * hidden * element);
    call.out_stride = hidden;
    for (int64_t row = 0; row < rows.m; row += chunk) {
      const Rows part = from_row(rows, row, chunk);
      run_linears(part, &call, 1);
      const LinearCall last = from_row(down, row, element);
      run_linears(Rows{call.out, hidden, part.m, hidden, rows.dtype}, &last, 1);
    }
    return;
  }
  const GemmBackend backend = gemm_backend(rows.dtype, rows.k, hidden);
  float* panels = panels_workspace().get<float>(panel_words(chunk, rows.k, backend));
  float* hidden_panels = hidden_ws.get<float>(panel_words(chunk, hidden, backend));
  for (int64_t row = 0; row < rows.m; row += chunk) {
    const int64_t m = rows.m - row < chunk ? rows.m - row : chunk;
    pack_panels(rows, row, m, backend, panels);
    GemmArgs args = gemm_args(first, panels, m, rows.k, backend, rows.dtype);
    args.out = hidden_panels;
    args.out_panels = true;
    run_gemms(&args, 1);
    args = gemm_args(from_row(down, row, element), hidden_panels, m, hidden, backend, rows.dtype);
    run_gemms(&args, 1);
  }
}

}  // namespace qvl
