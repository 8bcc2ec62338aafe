// Measures the read bandwidth that is achieved: the memory roofline of decoding.
#include "bandwidth.h"

#include <chrono>

#include "../cpu/kernel_table.h"
#include "../threads.h"
#include "../workspace.h"

namespace qvl {

double read_bandwidth(int64_t bytes, int repeats) {
  Workspace buffer;
  char* data = buffer.get<char>(bytes);
  const int64_t threads = max_threads();
  const int64_t share = bytes / threads / 4096 * 4096;
  parallel_ranges(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * share; i < end * share; ++i) data[i] = 1;
  });
  double best = 1e30;
  const KernelTable& table = kernels();
  volatile float sink = 0;
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    parallel_ranges(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) sink = table.read_bytes(data + t * share, share);
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (seconds < best) best = seconds;
  }
  return double(share * threads) / best / 1e9;
}

}  // namespace qvl
