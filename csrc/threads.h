// The only file that knows the threading library: OpenMP, the runtime that torch has already loaded.
#pragma once
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace qvl {

// torch.set_num_threads sets this runtime's own count, so it is also ours.
inline int max_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Runs body(task) for every task in [0, tasks), handed out one at a time so that a slow core takes fewer.
template <class Body>
inline void parallel_tasks(int64_t tasks, const Body& body) {
  const int threads = int(tasks < max_threads() ? tasks : max_threads());
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) body(task);
#endif
}

// Runs body(begin, end) over an even split of [0, count) with at least min_per_thread items a thread.
template <class Body>
inline void parallel_ranges(int64_t count, int64_t min_per_thread, const Body& body) {
  int64_t threads = min_per_thread > 0 ? count / min_per_thread : count;
  if (threads > max_threads()) threads = max_threads();
  if (threads <= 1) {
    if (count > 0) body(int64_t(0), count);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(int(threads))
  for (int64_t t = 0; t < threads; ++t) body(count * t / threads, count * (t + 1) / threads);
#endif
}

}  // namespace qvl
