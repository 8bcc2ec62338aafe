// Tile scheduler: how the outputs of GEMVs and GEMMs over the same activations are split over threads.
#pragma once
#include "../cpu/kernel_table.h"
#include "../threads.h"

namespace qvl {

// GEMVs in one parallel region: every thread takes an even range of all outputs, body(call, n_begin, n_end) its part of
// one call. weight_row_bytes: a thread gets 64 KB of weights at least, or waking it costs more than it saves.
template <class Body>
inline void parallel_gemvs(const LinearCall* calls, int count, int64_t weight_row_bytes, const Body& body) {
  int64_t total = 0;
  for (int i = 0; i < count; ++i) total += calls[i].n;
  parallel_ranges(total, 1 + 65536 / (weight_row_bytes + 1), [&](int64_t begin, int64_t end) {
    int64_t offset = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t n = calls[i].n, n_begin = begin > offset ? begin - offset : 0;
      const int64_t n_end = end < offset + n ? end - offset : n;
      offset += n;
      if (n_begin < n_end) body(calls[i], n_begin, n_end);
    }
  });
}

inline int64_t panel_count(int64_t m) { return (m + kernels().panel_width - 1) / kernels().panel_width; }

// How tiles of the output share panels. Without matrix units the tiles of the same weight rows follow each other. With
// them the tiles of the same panels do, as many as stay in L2: otherwise the panels' way from L3 is the limit.
struct TileOrder {
  int64_t panels, blocks;  // blocks of panels, of nearly the same number
  bool by_panels;
};

inline TileOrder tile_order(int64_t m, int64_t panel_bytes) {
  const int64_t panels = panel_count(m), cache_bytes = kernels().panel_cache_bytes;
  const bool all_fit = cache_bytes == 0 || kGemmTilePanels * panel_bytes <= cache_bytes;  // also panels with k = 0
  const int64_t size = all_fit                                        ? kGemmTilePanels
                       : kLeastTilePanels * panel_bytes > cache_bytes ? kLeastTilePanels
                                                                      : cache_bytes / panel_bytes;
  return {panels, (panels + size - 1) / size, cache_bytes > 0};
}

// GEMMs over the same panels in one parallel region: body(args, tile) for every tile of every GEMM, handed out one at a
// time. panel_bytes: of one panel over all k.
template <class Args, class Body>
inline void parallel_gemms(const Args* gemms, int count, int64_t panel_bytes, const Body& body) {
  const TileOrder order = tile_order(gemms[0].m, panel_bytes);
  const auto n_tiles = [](const Args& args) { return (args.n + gemm_tile_n(args) - 1) / gemm_tile_n(args); };
  int64_t all_n_tiles = 0;
  for (int i = 0; i < count; ++i) all_n_tiles += n_tiles(gemms[i]);
  parallel_tasks(all_n_tiles * order.blocks, [&](int64_t index) {
    const Args* args = gemms;
    int64_t n_tile = order.by_panels ? index % all_n_tiles : index / order.blocks;
    const int64_t block = order.by_panels ? index / all_n_tiles : index % order.blocks;
    for (; n_tile >= n_tiles(*args); ++args) n_tile -= n_tiles(*args);
    GemmTile tile;
    tile.n_begin = n_tile * gemm_tile_n(*args);
    tile.n_end = tile.n_begin + gemm_tile_n(*args) < args->n ? tile.n_begin + gemm_tile_n(*args) : args->n;
    tile.panel_begin = order.panels * block / order.blocks, tile.panel_end = order.panels * (block + 1) / order.blocks;
    body(*args, tile);
  });
}

}  // namespace qvl
