// Dense GEMM of bf16 on matrix units: panels and epilogues of gemm.inl.h. Two row tiles of weights at a time are copied
// into whole tiles, multiplied by all panels of the output's tile, and finished, while the next two are fetched.

inline int64_t tile_pair_rows(const GemmArgs& a) {
  return a.activation == Activation::swiglu ? kTileRows : 2 * kTileRows;
}

inline TileWeightPair tile_weight_pair(const GemmArgs& a, int64_t n, int64_t n_end) {
  const bool swiglu = a.activation == Activation::swiglu;
  TileWeightPair pair;
  for (int i = 0; i < 2; ++i) {
    const Weight& weight = swiglu && i == 1 ? a.up : a.weight;
    const int64_t row = swiglu ? n : n + i * kTileRows;
    pair.row_bytes[i] = weight.stride * int64_t(sizeof(bf16));
    pair.rows[i] = static_cast<const char*>(weight.w) + row * pair.row_bytes[i];
    pair.count[i] = n_end > row ? min_i(kTileRows, n_end - row) : 0;
  }
  return pair;
}

// Whether tiles are loaded from weight rows as they lie: for few lanes copying them would take longer than multiplying.
inline bool tile_rows_in_place(const GemmArgs& a, const GemmTile& tile, int64_t step_elements) {
  return tile.panel_end - tile.panel_begin == 1 && panel_vectors(a.m, tile.panel_begin) == 1 &&
         a.k % step_elements == 0 && (tile.n_end - tile.n_begin) % kTileRows == 0;
}

// c [rows][kPanelWidth] (+)= one K-block of a pair of row tiles times all lanes of a panel.
template <class Between>
inline void tile_gemm_panel(const TileRows& rows, int64_t row_tiles, const uint32_t* panel, int64_t width,
                            int64_t words, bool accumulate, float* c, Between&& between) {
  alignas(64) uint32_t tail[kTileWords * kPanelWidth];
  const char* padded = tile_tail(panel, words, width, tail);
  const int64_t steps = (words + kTileWords - 1) / kTileWords;
  tile_blocks(row_tiles, width / 16, [&](int64_t, auto row_count, int64_t lane, auto lane_count) {
    constexpr int kRows = row_count, kLanes = lane_count;
    if (accumulate) {
      tile_load_sums<kRows, kLanes>(c + lane * 16, kPanelWidth);
    } else {
      tile_zero_sums<kRows, kLanes>();
    }
    const TilePanel b{reinterpret_cast<const char*>(panel + lane * 16), width * 4, steps,
                      padded ? padded + lane * kTileRowBytes : nullptr};
    tile_multiply<DotBf16, kRows, kLanes, true>(rows, b, 0, steps, between);
    tile_store_sums<kRows, kLanes>(c + lane * 16, kPanelWidth);
  });
}

void tile_gemm_tile(const GemmArgs& a, const GemmTile& tile, float* scratch) {
  if (a.backend != GemmBackend::bf16_dot) return gemm_tile(a, tile, scratch);
  const TileRegion region;
  constexpr int64_t kPairSums = 2 * kTileRows * kPanelWidth;  // of one panel
  const int64_t words = a.k / 2, pair_rows = tile_pair_rows(a), panels = tile.panel_end - tile.panel_begin;
  const bool same_rows = a.activation != Activation::swiglu || a.up.stride == a.weight.stride;
  const bool in_place = same_rows && tile_rows_in_place(a, tile, 2 * kTileWords);
  const int64_t lane_tiles = tile_lanes(a.m, tile);
  char* tiles = reinterpret_cast<char*>(scratch + kGemmTilePanels * kGemmTileN * kPanelWidth);
  const int64_t block = in_place ? kGemmKBlock : kTileKBlock;
  // With k = 0 there is one empty block, which sets the sums to 0.
  for (int64_t word = 0; word == 0 || word < words; word += block) {
    const int64_t depth = min_i(block, words - word), steps = (depth + kTileWords - 1) / kTileWords;
    float* pair_sums = scratch;  // [pairs][panels]
    for (int64_t n = tile.n_begin; n < tile.n_end; n += pair_rows, pair_sums += panels * kPairSums) {
      const TileWeightPair pair = tile_weight_pair(a, n, tile.n_end);
      TileRows rows = packed_tile_rows(tiles, 0, steps);
      if (in_place) {
        rows = {pair.rows[0] + word * 4, pair.row_bytes[0], kTileRowBytes, pair.rows[1] - pair.rows[0]};
      } else {
        for (int i = 0; i < pair.tiles(); ++i)
          tile_pack_rows(pair.rows[i] + word * 4, pair.row_bytes[i], pair.count[i], depth * 4,
                         tiles + i * steps * kTileBytes);
      }
      // Next are the tile's other rows, then the first ones of its next K-block or of the thread's next tile.
      const bool last_rows = n + pair_rows >= tile.n_end, last_words = word + block >= words;
      const int64_t next_n = last_rows && !last_words ? tile.n_begin : n + pair_rows;
      const int64_t next_word = !last_rows ? word : last_words ? 0 : word + block;
      TilePairPrefetch prefetch(tile_weight_pair(a, next_n, last_rows && last_words ? tile.next_end : tile.n_end),
                                next_word * 4, min_i(block, words - next_word) * 4, lane_tiles);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t width = panel_vectors(a.m, tile.panel_begin + p) * Vec::kWidth;
        const uint32_t* panel =
            static_cast<const uint32_t*>(a.panels) + (tile.panel_begin + p) * kPanelWidth * words + word * width;
        float* c = pair_sums + p * kPairSums;
        if (in_place) {
          tile_gemm_panel(rows, pair.tiles(), panel, width, depth, word > 0, c,
                          TilePrefetch(rows, pair.tiles(), steps));
        } else {
          tile_gemm_panel(rows, pair.tiles(), panel, width, depth, word > 0, c, prefetch);
        }
        if (last_words)
          gemm_epilogue_panel<bf16>(a, tile.panel_begin + p, n, min_i(pair_rows, tile.n_end - n), kTileRows, c);
      }
    }
  }
}
