// Dense GEMM of bf16 on matrix units: the blocking, panels and epilogues of gemm.inl.h.

// The rows of a weight in a tile of the output, from word on, as tiles [row tiles][steps].
inline void tile_pack_weight(const Weight& weight, const GemmTile& tile, int64_t word, int64_t words, char* tiles) {
  const int64_t row_bytes = weight.stride * int64_t(sizeof(bf16)), rows = tile.n_end - tile.n_begin;
  const char* w = static_cast<const char*>(weight.w) + tile.n_begin * row_bytes + word * 4;
  const int64_t tile_row_bytes = (words + kTileWords - 1) / kTileWords * kTileBytes;
  for (int64_t n = 0; n < rows; n += kTileRows, tiles += tile_row_bytes)
    tile_pack_rows(w + n * row_bytes, row_bytes, min_i(kTileRows, rows - n), words * 4, tiles);
}

void tile_gemm_tile(const GemmArgs& a, const GemmTile& tile, float* scratch) {
  if (a.backend != GemmBackend::bf16_dot) return gemm_tile(a, tile, scratch);
  const TileRegion region;
  const bool swiglu = a.activation == Activation::swiglu;
  const int64_t words = a.k / 2, rows = tile.n_end - tile.n_begin;
  // The up projection's rows follow the gate's in the middle of the tile.
  const int64_t row_tiles = (swiglu ? kGemmTileN / 2 + rows : rows) / kTileRows + ((rows % kTileRows) != 0);
  float* c = scratch;
  char* weights = reinterpret_cast<char*>(scratch + kGemmTilePanels * kGemmTileN * kPanelWidth);
  alignas(64) uint32_t tail[kTileWords * kPanelWidth];
  // With k = 0 there is one empty block, which sets c to 0.
  for (int64_t word = 0; word == 0 || word < words; word += kGemmKBlock) {
    const int64_t depth = min_i(kGemmKBlock, words - word), steps = (depth + kTileWords - 1) / kTileWords;
    tile_pack_weight(a.weight, tile, word, depth, weights);
    if (swiglu) tile_pack_weight(a.up, tile, word, depth, weights + kGemmTileN / 2 / kTileRows * steps * kTileBytes);
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
        tile_multiply<DotBf16, kRows, kLanes>(weights + row * steps * kTileBytes, steps * kTileBytes, b, 0, steps, [] {});
        tile_store_sums<kRows, kLanes>(sums, kPanelWidth);
      });
    }
  }
  gemm_epilogue<bf16>(a, tile, c);
}
