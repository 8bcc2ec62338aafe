// The memory roofline: achieved read bandwidth.
#pragma once
#include <cstdint>

namespace qvl {

// Highest read bandwidth in GB/s over `repeats` passes of all threads over a buffer of `bytes`.
double read_bandwidth(int64_t bytes, int repeats);

}  // namespace qvl
