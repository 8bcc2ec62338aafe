#include "quant_linear.h"

#include "../threads.h"
#include "../workspace.h"

namespace qvl {

constexpr int64_t kMinChunks = 128;  // of 128 inputs, that a thread prepares: fewer take no longer than waking it

void run_quant_gemvs(const Rows& rows, const LinearCall* calls, int count) {
  const KernelTable& table = kernels();
  const WeightFormat format = calls[0].weight.format;
  const int64_t group = activation_group(format, calls[0].weight.group);
  const int64_t chunks = (rows.k + kQuantChunk - 1) / kQuantChunk, k_padded = chunks * kQuantChunk;
  thread_local Workspace packed_rows_ws;
  QuantGemvPrepareArgs prepare{rows.x, rows.stride, rows.k, k_padded, group, rows.dtype, format, nullptr};
  prepare.packed_rows = packed_rows_ws.get<char>(rows.m * packed_row_bytes(k_padded));
  norm_prologue(rows, 0, rows.m);
  parallel_ranges(rows.m * chunks, kMinChunks,
                  [&](int64_t begin, int64_t end) { table.quant_gemv_prepare(prepare, begin, end); });
  int64_t total = 0;
  for (int i = 0; i < count; ++i) total += calls[i].n;
  // 64 KB of weights a thread at least, or waking it costs more than it saves.
  const int64_t row_bytes = format == WeightFormat::int8 ? rows.k : rows.k / 2, min_rows = 1 + 65536 / (row_bytes + 1);
  parallel_ranges(total, min_rows, [&](int64_t begin, int64_t end) {
    int64_t offset = 0;
    for (int i = 0; i < count; ++i) {
      const LinearCall& call = calls[i];
      const int64_t n_begin = begin > offset ? begin - offset : 0;
      const int64_t n_end = end < offset + call.n ? end - offset : call.n;
      offset += call.n;
      if (n_begin >= n_end) continue;
      QuantGemvArgs args{};
      args.m = rows.m, args.n = call.n, args.k = rows.k, args.k_padded = k_padded;
      args.format = format, args.group = group;
      args.packed_rows = prepare.packed_rows;
      args.w = call.weight.w, args.w_stride = call.weight.stride;
      args.scales = call.weight.scales, args.scale_stride = call.weight.scale_stride;
      if (call.up) {
        args.w2 = call.up->w, args.w2_stride = call.up->stride;
        args.scales2 = call.up->scales, args.scale2_stride = call.up->scale_stride;
      }
      args.bias = call.weight.bias;
      args.dtype = rows.dtype;
      args.activation = call.activation;
      args.residual = call.residual, args.residual_stride = call.residual_stride;
      args.out = call.out, args.out_stride = call.out_stride;
      table.quant_gemv_rows(args, n_begin, n_end);
    }
  });
}

}  // namespace qvl
