#include "../threads.h"
#include "../workspace.h"
#include "tile_scheduler.h"
#include "quant_linear.h"

namespace qvl {

namespace {

// Activations [m, k] as the GEMM reads them.
struct Panels {
  uint32_t* words;
  float* scales;
  int64_t k, group;
};

Panels get_panels(Workspace& workspace, int64_t m, int64_t k, int64_t group) {
  const KernelTable& table = kernels();
  const int64_t width = panel_count(m) * table.panel_width, words = width * ((k + 3) / 4 * 4 / table.quant_per_word);
  uint32_t* memory = workspace.get<uint32_t>(words + width * ((k + group - 1) / group));
  return Panels{memory, reinterpret_cast<float*>(memory + words), k, group};
}

void pack_panels(const Rows& rows, const Panels& panels) {
  const KernelTable& table = kernels();
  QuantGemmPackArgs args{};
  args.rows.x = rows.x, args.rows.x_stride = rows.stride;
  args.rows.k = rows.k, args.rows.group = panels.group, args.rows.dtype = rows.dtype;
  args.rows.k_padded = (rows.k + panels.group - 1) / panels.group * panels.group;
  args.m = rows.m;
  args.words = panels.words, args.scales = panels.scales;
  parallel_tasks((rows.m + table.vector_width - 1) / table.vector_width, [&](int64_t block) {
    thread_local Workspace scratch;
    const int64_t begin = block * table.vector_width, end = begin + table.vector_width;
    norm_prologue(rows, begin, end < rows.m ? end : rows.m);
    table.quant_gemm_pack(args, block, scratch.get<char>(quant_gemm_pack_scratch_bytes(table, args.rows)));
  });
}

QuantGemmArgs gemm_args(const LinearCall& call, const Panels& panels, int64_t m, DType dtype) {
  const Weight& weight = call.weight;
  QuantGemmArgs args{};
  args.panels = panels.words, args.x_scales = panels.scales;
  args.m = m, args.n = call.n, args.k = panels.k;
  args.format = weight.format, args.group = panels.group;
  args.w = weight.w, args.w_stride = weight.stride;
  args.scales = weight.scales, args.scale_stride = weight.scale_stride;
  if (call.up) {
    args.w2 = call.up->w, args.w2_stride = call.up->stride;
    args.scales2 = call.up->scales, args.scale2_stride = call.up->scale_stride;
  }
  args.bias = weight.bias;
  args.dtype = dtype;
  args.activation = call.activation;
  args.residual = call.residual, args.residual_stride = call.residual_stride;
  args.out = call.out, args.out_stride = call.out_stride;
  return args;
}

void run_gemms(const QuantGemmArgs* gemms, int count) {
  const KernelTable& table = kernels();
  const auto tile_n = [](const QuantGemmArgs&) { return kQuantGemmTileN; };
  parallel_gemms(gemms, count, tile_n,
                 [&](const auto& args, int64_t n_begin, int64_t n_end, int64_t panel_begin, int64_t panel_end) {
                   thread_local Workspace scratch;
                   table.quant_gemm_tile(args, n_begin, n_end, panel_begin, panel_end,
                                         scratch.get<float>(quant_gemm_scratch_floats(table)));
                 });
}

int64_t group_of(const LinearCall& call) { return activation_group(call.weight.format, call.weight.group); }

Workspace& panels_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

}  // namespace

void run_quant_linears(const Rows& rows, const LinearCall* calls, int count) {
  if (rows.m <= kQuantGemvMaxM) return run_quant_gemvs(rows, calls, count);
  const int64_t element = dtype_bytes(rows.dtype);
  QuantGemmArgs gemms[kMaxCalls];
  for (int64_t row = 0; row < rows.m; row += kChunkM) {
    const Rows part = from_row(rows, row, kChunkM);
    const Panels panels = get_panels(panels_workspace(), part.m, rows.k, group_of(calls[0]));
    pack_panels(part, panels);
    for (int i = 0; i < count; ++i) gemms[i] = gemm_args(from_row(calls[i], row, element), panels, part.m, rows.dtype);
    run_gemms(gemms, count);
  }
}

void run_quant_mlp(const Rows& rows, const LinearCall& first, const LinearCall& down) {
  thread_local Workspace hidden_ws;
  for (int64_t row = 0; row < rows.m; row += kChunkM) {
    const Rows part = from_row(rows, row, kChunkM);
    const Panels panels = get_panels(panels_workspace(), part.m, rows.k, group_of(first));
    const Panels hidden = get_panels(hidden_ws, part.m, first.n, group_of(down));
    pack_panels(part, panels);
    QuantGemmArgs args = gemm_args(first, panels, part.m, rows.dtype);
    args.out_panels = true;
    args.out = hidden.words, args.out_scales = hidden.scales, args.out_group = hidden.group;
    run_gemms(&args, 1);
    args = gemm_args(from_row(down, row, dtype_bytes(rows.dtype)), hidden, part.m, rows.dtype);
    run_gemms(&args, 1);
  }
}

}  // namespace qvl
