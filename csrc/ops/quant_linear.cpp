// Linear layers over quantised weights: GEMV of up to 16 rows of activations.
#include "quant_linear.h"

#include "../threads.h"
#include "../workspace.h"
#include "tile_scheduler.h"

namespace qvl {

constexpr int64_t kMinChunks = 128;  // of 128 inputs, that a thread quantises: fewer take no longer than waking it

void run_quant_gemvs(const LinearInput& input, const LinearCall* calls, int count) {
  const KernelTable& table = kernels();
  const WeightFormat format = calls[0].weight.format;
  const int64_t group = activation_group(format, calls[0].weight.group);
  const int64_t chunks = (input.k + kQuantChunk - 1) / kQuantChunk, k_padded = chunks * kQuantChunk;
  thread_local Workspace packed_rows_ws;
  char* packed_rows = packed_rows_ws.get<char>(input.m * packed_row_bytes(k_padded));
  const QuantGemvPrepareArgs prepare{input.x, input.stride, input.k, k_padded, group, input.dtype, format, packed_rows};
  run_norm_prologue(input, 0, input.m);
  parallel_ranges(input.m * chunks, kMinChunks,
                  [&](int64_t begin, int64_t end) { table.quant_gemv_prepare(prepare, begin, end); });
  const int64_t weight_row_bytes = format == WeightFormat::int8 ? input.k : input.k / 2;
  parallel_gemvs(calls, count, weight_row_bytes, [&](const LinearCall& call, int64_t n_begin, int64_t n_end) {
    const QuantGemvArgs args{{call, input.m, input.k, input.dtype}, k_padded, group, packed_rows};
    table.quant_gemv_rows(args, n_begin, n_end);
  });
}

}  // namespace qvl
