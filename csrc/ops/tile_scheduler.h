// How GEMMs are split over threads.
#pragma once
#include "../cpu/kernel_table.h"
#include "../threads.h"

namespace qvl {

inline int64_t panel_count(int64_t m) { return (m + kernels().panel_width - 1) / kernels().panel_width; }

// GEMMs over the same panels in one parallel region: body(args, n_begin, n_end, panel_begin, panel_end), a task being
// tile_n(args) weight rows by up to kGemmTilePanels panels.
template <class Args, class RowsPerTask, class Body>
inline void parallel_gemms(const Args* gemms, int count, const RowsPerTask& tile_n, const Body& body) {
  const int64_t panels = panel_count(gemms[0].m), m_tiles = (panels + kGemmTilePanels - 1) / kGemmTilePanels;
  const auto n_tiles = [&](const Args& args) { return (args.n + tile_n(args) - 1) / tile_n(args); };
  int64_t tasks = 0;
  for (int i = 0; i < count; ++i) tasks += n_tiles(gemms[i]) * m_tiles;
  parallel_tasks(tasks, [&](int64_t task) {
    const Args* args = gemms;
    int64_t n_tile = task / m_tiles;
    for (; n_tile >= n_tiles(*args); ++args) n_tile -= n_tiles(*args);
    const int64_t rows = tile_n(*args), n_begin = n_tile * rows, panel_begin = task % m_tiles * kGemmTilePanels;
    const int64_t n_end = n_begin + rows < args->n ? n_begin + rows : args->n;
    const int64_t panel_end = panel_begin + kGemmTilePanels < panels ? panel_begin + kGemmTilePanels : panels;
    body(*args, n_begin, n_end, panel_begin, panel_end);
  });
}

}  // namespace qvl
