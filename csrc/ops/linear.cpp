// Linear layers over dense weights, the choice of the GEMM backend, and the split by weight format.
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
  LinearCall call;
  call.weight = {w, k, nullptr};
  call.n = n, call.out = out, call.out_stride = n;
  const GemmArgs args{{call, m, k, DType::bf16}, panels, backend, false};
  float* scratch = gemm_scratch().get<float>(gemm_scratch_floats(table));
  double best = 1e9;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    table.gemm_tile(args, GemmTile{0, n, n, 0, 1}, scratch);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (seconds < best) best = seconds;
  }
  return best;
}

// The bf16 dot instruction is twice as fast as FMA on Zen 5 and half as fast on some Intel processors: it is measured,
// once per process. Matrix units are always faster, and always taken where they are emulated.
bool bf16_dot_is_faster() {
  if (!kernels().has_bf16_dot) return false;
  if (kernels().has_tiles) return true;
  static const bool faster = time_gemm_backend(GemmBackend::bf16_dot) < time_gemm_backend(GemmBackend::fma);
  return faster;
}

int64_t chunk_m(const LinearInput& input) { return input.m < kChunkM ? input.m : kChunkM; }

// 32-bit words that panels of [m, k] take.
int64_t panel_words(int64_t m, int64_t k, GemmBackend backend) {
  return panel_count(m) * kernels().panel_width * (backend == GemmBackend::bf16_dot ? k / 2 : k);
}

void pack_panels(const LinearInput& input, GemmBackend backend, float* panels) {
  const KernelTable& table = kernels();
  const GemmPackArgs args{input.x, input.stride, input.m, input.k, input.dtype, backend, panels};
  parallel_tasks(panel_count(input.m), [&](int64_t panel) {
    const int64_t begin = panel * table.panel_width, end = begin + table.panel_width;
    run_norm_prologue(input, begin, end < input.m ? end : input.m);
    table.gemm_pack(args, panel);
  });
}

Workspace& panels_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

void run_gemms(const GemmArgs* gemms, int count) {
  const KernelTable& table = kernels();
  parallel_gemms(gemms, count, [&](const GemmArgs& args, const GemmTile& tile) {
    table.gemm_tile(args, tile, gemm_scratch().get<float>(gemm_scratch_floats(table)));
  });
}

void run_gemvs(const LinearInput& input, const LinearCall* calls, int count) {
  const KernelTable& table = kernels();
  const int64_t block = 2 * table.vector_width;
  const int64_t k_padded = (input.k + block - 1) / block * block, element_bytes = dtype_bytes(input.dtype);
  const GemmBackend backend = gemm_backend(input.dtype, 2, 2);
  // One block of padding between rows: rows 4 KB apart would compete for the same sets of the L1 cache.
  const int64_t x_stride = (backend == GemmBackend::bf16_dot ? k_padded / 2 : k_padded) + block;
  thread_local Workspace prepared_ws;
  float* prepared = prepared_ws.get<float>(input.m * x_stride);
  run_norm_prologue(input, 0, input.m);
  for (int64_t m = 0; m < input.m; ++m)
    table.gemv_prepare(static_cast<const char*>(input.x) + m * input.stride * element_bytes, input.dtype, input.k,
                       backend, prepared + m * x_stride);
  parallel_gemvs(calls, count, input.k * element_bytes, [&](const LinearCall& call, int64_t n_begin, int64_t n_end) {
    const GemvArgs args{{call, input.m, input.k, input.dtype}, prepared, x_stride, backend};
    table.gemv_rows(args, n_begin, n_end);
  });
}

void run_dense(const LinearInput& input, const LinearCall* calls, int count) {
  if (input.m <= gemv_max_m(calls[0])) return run_gemvs(input, calls, count);
  const GemmBackend backend = gemm_backend(input.dtype, input.k, 2);
  float* panels = panels_workspace().get<float>(panel_words(chunk_m(input), input.k, backend));
  for_chunks(input, [&](const LinearInput& chunk, int64_t row) {
    pack_panels(chunk, backend, panels);
    GemmArgs gemms[kMaxCalls];
    for (int i = 0; i < count; ++i)
      gemms[i] = {
          {from_row(calls[i], row, dtype_bytes(chunk.dtype)), chunk.m, chunk.k, chunk.dtype}, panels, backend, false};
    run_gemms(gemms, count);
  });
}

bool quantized(const LinearCall& call) { return call.weight.format != WeightFormat::dense; }

}  // namespace

GemmBackend gemm_backend(DType dtype, int64_t k, int64_t n) {
  if (dtype == DType::bf16 && k % 2 == 0 && n % 2 == 0 && bf16_dot_is_faster()) return GemmBackend::bf16_dot;
  return GemmBackend::fma;
}

void run_linears(LinearInput input, const LinearCall* calls, int count) {
  if (input.m == 0) return;
  for (int begin = 0, end; begin < count; begin = end) {
    const Weight& first = calls[begin].weight;
    for (end = begin + 1;
         end < count && calls[end].weight.format == first.format && calls[end].weight.group == first.group;)
      ++end;
    if (first.format == WeightFormat::dense) {
      run_dense(input, calls + begin, end - begin);
    } else {
      run_quant_linears(input, calls + begin, end - begin);
    }
    input.norm = nullptr;  // the prologue has run
  }
}

void run_mlp(const LinearInput& input, const LinearCall& first, const LinearCall& down) {
  if (input.m == 0) return;
  const int64_t hidden = first.n, element_bytes = dtype_bytes(input.dtype);
  thread_local Workspace hidden_ws;
  const bool by_gemv = input.m <= gemv_max_m(first) || input.m <= gemv_max_m(down);
  if (!by_gemv && quantized(first) && quantized(down)) return run_quant_mlp(input, first, down);
  if (by_gemv || quantized(first) || quantized(down)) {
    LinearCall up = first;
    up.out = hidden_ws.get<char>(chunk_m(input) * hidden * element_bytes);
    up.out_stride = hidden;
    return for_chunks(input, [&](const LinearInput& chunk, int64_t row) {
      run_linears(chunk, &up, 1);
      const LinearCall last = from_row(down, row, element_bytes);
      run_linears(LinearInput{up.out, hidden, chunk.m, hidden, chunk.dtype}, &last, 1);
    });
  }
  const GemmBackend backend = gemm_backend(input.dtype, input.k, hidden);
  float* panels = panels_workspace().get<float>(panel_words(chunk_m(input), input.k, backend));
  float* hidden_panels = hidden_ws.get<float>(panel_words(chunk_m(input), hidden, backend));
  for_chunks(input, [&](const LinearInput& chunk, int64_t row) {
    pack_panels(chunk, backend, panels);
    GemmArgs args{{first, chunk.m, chunk.k, chunk.dtype}, panels, backend, true};
    args.out = hidden_panels;
    run_gemms(&args, 1);
    args = {{from_row(down, row, element_bytes), chunk.m, hidden, chunk.dtype}, hidden_panels, backend, false};
    run_gemms(&args, 1);
  });
}

}  // namespace qvl
