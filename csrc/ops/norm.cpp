// RMS norm and layer norm of rows, split over threads.
#include "norm.h"

#include "../threads.h"

namespace qvl {

void run_norm(const NormArgs& args, int64_t rows) {
  const KernelTable& table = kernels();
  const int64_t min_rows = 1 + 16384 / (args.size + 1);  // about a microsecond of work a thread
  parallel_ranges(rows, min_rows, [&](int64_t begin, int64_t end) { table.norm_rows(args, begin, end); });
}

}  // namespace qvl
