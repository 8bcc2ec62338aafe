// Measures the peak of each unit: the compute roofline of prompts.
#include "unit_peaks.h"

#include <algorithm>
#include <chrono>

#include "../cpu/kernel_table.h"
#include "../threads.h"

namespace qvl {

std::map<std::string, double> unit_peaks(int repeats) {
  constexpr std::pair<const char*, ComputeUnit> kUnits[] = {{"fma", ComputeUnit::fma},
                                                            {"bf16_dot", ComputeUnit::bf16_dot},
                                                            {"int8_dot", ComputeUnit::int8_dot},
                                                            {"bf16_tiles", ComputeUnit::bf16_tiles},
                                                            {"int8_tiles", ComputeUnit::int8_tiles}};
  constexpr int64_t kSteps =
      1 << 17;  // far longer than starting the threads, and shorter than a turn of another program
  const KernelTable& table = kernels();
  const int64_t threads = max_threads();
  std::map<std::string, double> peaks;
  for (const auto& [name, unit] : kUnits) {
    const double operations = double(threads) * table.run_unit(unit, 1) * double(kSteps);
    if (operations == 0) continue;
    double& best = peaks[name];
    for (int r = 0; r < repeats; ++r) {
      const auto start = std::chrono::steady_clock::now();
      parallel_ranges(threads, 1, [&, unit = unit](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) table.run_unit(unit, kSteps);
      });
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      best = std::max(best, operations / seconds / 1e9);
    }
  }
  return peaks;
}

}  // namespace qvl
