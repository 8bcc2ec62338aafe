// Measures the peak of each unit: the compute roofline of prompts.
#include "unit_peaks.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "../cpu/kernel_table.h"
#include "../threads.h"

namespace qvl {

std::map<std::string, double> unit_peaks(int repeats) {
  struct Unit {
    const char* name;
    ComputeUnit unit;
    int64_t steps;
  };
  // A millisecond or less: another program takes a core away for longer, and some loops run undisturbed.
  constexpr int64_t kVectorSteps = 1 << 18, kTileSteps = 1 << 14;
  constexpr Unit kUnits[] = {{"fma", ComputeUnit::fma, kVectorSteps},
                             {"bf16_dot", ComputeUnit::bf16_dot, kVectorSteps},
                             {"int8_dot", ComputeUnit::int8_dot, kVectorSteps},
                             {"bf16_tiles", ComputeUnit::bf16_tiles, kTileSteps},
                             {"int8_tiles", ComputeUnit::int8_tiles, kTileSteps}};
  const KernelTable& table = kernels();
  const int64_t threads = max_threads();
  std::map<std::string, double> peaks;
  for (const auto& [name, unit, steps] : kUnits) {
    const double operations = table.run_unit(unit, 1) * double(steps);
    if (operations == 0) continue;
    std::vector<double> fastest(size_t(threads), 0.0);
    parallel_ranges(threads, 1, [&, unit = unit, steps = steps](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int r = 0; r < repeats; ++r) {
          const auto start = std::chrono::steady_clock::now();
          table.run_unit(unit, steps);
          const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
          fastest[size_t(t)] = std::max(fastest[size_t(t)], operations / seconds / 1e9);
        }
    });
    peaks[name] = std::accumulate(fastest.begin(), fastest.end(), 0.0);
  }
  return peaks;
}

}  // namespace qvl
