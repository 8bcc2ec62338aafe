// QK norm and rotary embedding of rows, split over threads.
#include "rope.h"

#include "../threads.h"

namespace qvl {

void run_qk_norm_rope(const RopeArgs& args) {
  const KernelTable& table = kernels();
  const int64_t row_elements = (args.heads + args.kv_heads) * args.head_dim;
  parallel_ranges(args.batch * args.time, 1 + 16384 / (row_elements + 1),
                  [&](int64_t begin, int64_t end) { table.rope_rows(args, begin, end); });
}

}  // namespace qvl
