// swiglu and gelu_tanh of rows, split over threads.
#include "activation.h"

#include "../threads.h"

namespace qvl {

void run_activation(const ActivationArgs& args) {
  const KernelTable& table = kernels();
  parallel_ranges(args.rows, 1 + 8192 / (args.size + 1),
                  [&](int64_t begin, int64_t end) { table.activation_rows(args, begin, end); });
}

}  // namespace qvl
