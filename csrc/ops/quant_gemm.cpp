// Linear layers over quantised weights: GEMM over int8 panels, and the MLP that keeps its hidden layer in panels.
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

void pack_panels(const LinearInput& input, const Panels& panels) {
  const KernelTable& table = kernels();
  QuantGemmPackArgs args{};
  args.rows.x = input.x, args.rows.x_stride = input.stride;
  args.rows.k = input.k, args.rows.group = panels.group, args.rows.dtype = input.dtype;
  args.rows.k_padded = (input.k + panels.group - 1) / panels.group * panels.group;
  args.m = input.m;
  args.words = panels.words, args.scales = panels.scales;
  parallel_tasks((input.m + table.vector_width - 1) / table.vector_width, [&](int64_t block) {
    thread_local Workspace scratch;
    const int64_t begin = block * table.vector_width, end = begin + table.vector_width;
    run_norm_prologue(input, begin, end < input.m ? end : input.m);
    table.quant_gemm_pack(args, block, scratch.get<char>(quant_gemm_pack_scratch_bytes(table, args.rows)));
  });
}

QuantGemmArgs gemm_args(const LinearCall& call, const Panels& panels, int64_t m, DType dtype) {
  QuantGemmArgs args{};
  static_cast<LinearArgs&>(args) = {call, m, panels.k, dtype};
  args.panels = panels.words, args.x_scales = panels.scales, args.group = panels.group;
  return args;
}

void run_gemms(const QuantGemmArgs* gemms, int count) {
  const KernelTable& table = kernels();
  parallel_gemms(gemms, count, [&](const QuantGemmArgs& args, const GemmTile& tile) {
    thread_local Workspace scratch;
    table.quant_gemm_tile(args, tile, scratch.get<float>(quant_gemm_scratch_floats(table)));
  });
}

int64_t group_of(const LinearCall& call) {
  if (kernels().has_tiles) return kTileQuantGroup;
  return activation_group(call.weight.format, call.weight.group);
}

Workspace& panels_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

}  // namespace

void run_quant_linears(const LinearInput& input, const LinearCall* calls, int count) {
  if (input.m <= gemv_max_m(calls[0])) return run_quant_gemvs(input, calls, count);
  for_chunks(input, [&](const LinearInput& chunk, int64_t row) {
    const Panels panels = get_panels(panels_workspace(), chunk.m, chunk.k, group_of(calls[0]));
    pack_panels(chunk, panels);
    QuantGemmArgs gemms[kMaxCalls];
    for (int i = 0; i < count; ++i)
      gemms[i] = gemm_args(from_row(calls[i], row, dtype_bytes(chunk.dtype)), panels, chunk.m, chunk.dtype);
    run_gemms(gemms, count);
  });
}

void run_quant_mlp(const LinearInput& input, const LinearCall& first, const LinearCall& down) {
  thread_local Workspace hidden_ws;
  for_chunks(input, [&](const LinearInput& chunk, int64_t row) {
    const Panels panels = get_panels(panels_workspace(), chunk.m, chunk.k, group_of(first));
    const Panels hidden = get_panels(hidden_ws, chunk.m, first.n, group_of(down));
    pack_panels(chunk, panels);
    QuantGemmArgs args = gemm_args(first, panels, chunk.m, chunk.dtype);
    args.out_panels = true;
    args.out = hidden.words, args.out_scales = hidden.scales, args.out_group = hidden.group;
    run_gemms(&args, 1);
    args = gemm_args(from_row(down, row, dtype_bytes(chunk.dtype)), hidden, chunk.m, chunk.dtype);
    run_gemms(&args, 1);
  });
}

}  // namespace qvl
