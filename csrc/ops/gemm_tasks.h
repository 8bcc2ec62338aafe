// How GEMMs are split over threads.
#pragma once
#include "../cpu/kernel_table.h"
#include "../threads.h"

namespace qvl {

inline int64_t panel_count(int64_t m) { return (m + kernels().panel_width - 1) / kernels().panel_width; }

// GEMMs over the same panels in one parallel region: body(args, n_begin, n_end, panel_begin, panel_end), a task being
// rows_per_task(args) weight rows by up to kGemmPanels panels.
template <class Args, class RowsPerTask, class Body>
inline void parallel_gemms(const Args* gemms, int count, const RowsPerTask& rows_per_task, const Body& body) {
  const int64_t panels = panel_count(gemms[0].m), m_tasks = (panels + kGemmPanels - 1) / kGemmPanels;
  const auto n_tasks = [&](const Args& args) { return (args.n + rows_per_task(args) - 1) / rows_per_task(args); };
  int64_t tasks = 0;
  for (int i = 0; i < count; ++i) tasks += n_tasks(gemms[i]) * m_tasks;
  parallel_tasks(tasks, [&](int64_t task) {
    const Args* args = gemms;
    int64_t n_task = task / m_tasks;
    for (; n_task >= n_tasks(*args); ++args) n_task -= n_tasks(*args);
    const int64_t rows = rows_per_task(*args), n_begin = n_task * rows, panel_begin = task % m_tasks * kGemmPanels;
    const int64_t n_end = n_begin + rows < args->n ? n_begin + rows : args->n;
    const int64_t panel_end = panel_begin + kGemmPanels < panels ? panel_begin + kGemmPanels : panels;
    body(*args, n_begin, n_end, panel_begin, panel_end);
  });
}

}  // namespace qvl
