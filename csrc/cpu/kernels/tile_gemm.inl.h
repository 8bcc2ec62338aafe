// Dense GEMM of bf16 on matrix units: the blocking, panels and epilogues of gemm.inl.h.

// A tile's weight rows. For SwiGLU the rows of the up projection follow those of the gate from kGemmTileN / 2 on.
struct TileWeightRows {
  const char* at;
  int64_t row_bytes, count;
};

inline TileWeightRows tile_weight_rows(const GemmArgs& a, const GemmTile& tile, int64_t row) {
  const int64_t rows = tile.n_end - tile.n_begin;
  const bool up = a.activation == Activation::swiglu && row >= kGemmTileN / 2;
  const Weight& weight = up ? a.up : a.weight;
  if (up) row -= kGemmTileN / 2;
  const int64_t row_bytes = weight.stride * int64_t(sizeof(bf16));
  return {static_cast<const char*>(weight.w) + (tile.n_begin + row) * row_bytes, row_bytes,
          rows > row ? min_i(kTileRows, rows - row) : 0};
}

// Whether tiles are loaded from weight rows as they lie: for few lanes copying them would take longer than multiplying.
inline bool tile_rows_in_place(const GemmArgs& a, const GemmTile& tile, int64_t step_elements) {
  return tile.panel_end - tile.panel_begin == 1 && panel_vectors(a.m, tile.panel_begin) == 1 &&
         a.k % step_elements == 0 && (tile.n_end - tile.n_begin) % kTileRows == 0;
}

void tile_gemm_tile(const GemmArgs& a, const GemmTile& tile, float* scratch) {
  if (a.backend != GemmBackend::bf16_dot) return gemm_tile(a, tile, scratch);
  const int64_t words = a.k / 2, rows = tile.n_end - tile.n_begin;
  const int64_t row_tiles =
      (rows + kTileRows - 1) / kTileRows + (a.activation == Activation::swiglu ? kGemmTileN / 2 / kTileRows : 0);
  // The tiles between the last rows of the gate and the first of the up projection have no weights.
  const bool gap = a.activation == Activation::swiglu && rows < kGemmTileN / 2;
  const bool in_place = !gap && tile_rows_in_place(a, tile, 2 * kTileWords);
  float* c = scratch;
  char* weights = reinterpret_cast<char*>(scratch + kGemmTilePanels * kGemmTileN * kPanelWidth);
  alignas(64) uint32_t tail[kTileWords * kPanelWidth];
  {
    const TileRegion region;
    // With k = 0 there is one empty block, which sets c to 0.
    for (int64_t word = 0; word == 0 || word < words; word += kGemmKBlock) {
      const int64_t depth = min_i(kGemmKBlock, words - word), steps = (depth + kTileWords - 1) / kTileWords;
      for (int64_t row = 0; row < row_tiles && !in_place; ++row) {
        const TileWeightRows from = tile_weight_rows(a, tile, row * kTileRows);
        tile_pack_rows(from.at + word * 4, from.row_bytes, from.count, depth * 4, weights + row * steps * kTileBytes);
      }
      for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p) {
        const int64_t width = panel_vectors(a.m, p) * Vec::kWidth;
        const uint32_t* panel = static_cast<const uint32_t*>(a.panels) + p * kPanelWidth * words + word * width;
        float* block = c + (p - tile.panel_begin) * kGemmTileN * kPanelWidth;
        const char* padded = tile_tail(panel, depth, width, tail);
        tile_blocks(row_tiles, width / 16, [&](int64_t row, auto row_count, int64_t lane, auto lane_count) {
          constexpr int kRows = row_count, kLanes = lane_count;
          float* sums = block + row * 16 * kPanelWidth + lane * 16;
          if (word > 0) {
            tile_load_sums<kRows, kLanes>(sums, kPanelWidth);
          } else {
            tile_zero_sums<kRows, kLanes>();
          }
          const TilePanel b{reinterpret_cast<const char*>(panel + lane * 16), width * 4, steps,
                            padded ? padded + lane * kTileRowBytes : nullptr};
          if (in_place) {
            const TileWeightRows first = tile_weight_rows(a, tile, row * kTileRows);
            const TileWeightRows second = tile_weight_rows(a, tile, (row + kRows - 1) * kTileRows);
            const TileRows from{first.at + word * 4, first.row_bytes, kTileRowBytes, second.at - first.at};
            tile_multiply<DotBf16, kRows, kLanes>(from, b, 0, steps, TilePrefetch<kRows>(from, steps));
          } else {
            tile_multiply<DotBf16, kRows, kLanes>(packed_tile_rows(weights, row, steps), b, 0, steps, [] {});
          }
          tile_store_sums<kRows, kLanes>(sums, kPanelWidth);
        });
      }
    }
  }
  gemm_epilogue<bf16>(a, tile, c);
}
