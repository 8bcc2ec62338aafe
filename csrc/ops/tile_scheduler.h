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

// Tiles that a thread takes at once: with matrix units it fetches the weights of the next one while it multiplies.
inline int64_t tiles_at_once(int64_t tiles) {
  const int64_t most = kernels().has_tiles ? 4 : 1, share = tiles / (8 * max_threads());
  return share < 1 ? 1 : share < most ? share : most;
}

// GEMMs over the same panels in one parallel region: body(args, tile) for every tile of every GEMM, handed out a few at
// a time. Tiles of the same weight rows follow each other, or, with matrix units, tiles of the same panels, which then
// stay in L2: their way from L3 would be the limit.
template <class Args, class Body>
inline void parallel_gemms(const Args* gemms, int count, const Body& body) {
  const bool by_panels = kernels().has_tiles;
  const int64_t panels = panel_count(gemms[0].m);
  int64_t blocks = (panels + kGemmTilePanels - 1) / kGemmTilePanels;  // of panels, of nearly the same number
  const auto n_tiles = [](const Args& args) { return (args.n + gemm_tile_n(args) - 1) / gemm_tile_n(args); };
  int64_t all_n_tiles = 0;
  for (int i = 0; i < count; ++i) all_n_tiles += n_tiles(gemms[i]);
  while (by_panels && blocks < panels && all_n_tiles * blocks < 2 * max_threads()) ++blocks;
  const int64_t tiles = all_n_tiles * blocks, run = tiles_at_once(tiles);
  parallel_tasks((tiles + run - 1) / run, [&](int64_t task) {
    const int64_t end = (task + 1) * run < tiles ? (task + 1) * run : tiles;
    for (int64_t index = task * run; index < end; ++index) {
      const int64_t block = by_panels ? index / all_n_tiles : index % blocks;
      int64_t n_tile = by_panels ? index % all_n_tiles : index / blocks;
      const Args* args = gemms;
      for (; n_tile >= n_tiles(*args); ++args) n_tile -= n_tiles(*args);
      const auto up_to_n = [&](int64_t n) { return n < args->n ? n : args->n; };
      GemmTile tile;
      tile.n_begin = n_tile * gemm_tile_n(*args);
      tile.n_end = up_to_n(tile.n_begin + gemm_tile_n(*args));
      tile.next_end = index + 1 < end ? up_to_n(tile.n_end + gemm_tile_n(*args)) : tile.n_end;
      tile.panel_begin = panels * block / blocks, tile.panel_end = panels * (block + 1) / blocks;
      body(*args, tile);
    }
  });
}

}  // namespace qvl
